"""A teacher on disk: targets that were cached, read by row.

The one idea: rows are read one by one from the shards that hold them, so any order costs the same and nothing is held
in memory; what the cache was made for is checked before the first is read.

Shapes: B rows, T positions a row, V vocabulary.
"""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.dataset import SHARD_FACTS, PackedDataset, PackedRows, check_shards
from limbeck.errors import CorruptError, MismatchError
from limbeck.manifests import CacheManifest
from limbeck.storage import inside
from limbeck.targets.codec import CodecSpec, decode
from limbeck.targets.sparse import SparseTargets, concatenate
from limbeck.teachers.base import Teacher


class TeacherCache(Teacher):
    """Cached targets of one split: a teacher that reads instead of computing.

    Example:
        >>> cache = TeacherCache("outputs/quickstart/cache")
        >>> targets = cache.read([0, 5])  # rows 0 and 5: SparseTargets [2, T, ...]
        >>> dense = targets.to_dense()  # [2, T, V]

    Raises:
        IncompleteError: the folder is unfinished.
        CorruptError: a shard is missing, truncated or altered, or holds other rows than the manifest says.
    """

    in_workers = True

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = CacheManifest.read(self.folder)
        if split not in self.manifest.splits:
            raise MismatchError(
                f"{self.folder} holds the splits {', '.join(self.manifest.splits)} and not {split}. "
                "Add it to teacher.splits and make the cache again."
            )
        codec = {key: value for key, value in self.manifest.codec.items() if key != "version"}
        self.spec = CodecSpec(**{**codec, "temperatures": tuple(codec["temperatures"])})
        self.temperatures = self.spec.temperatures
        self.vocab_size = self.spec.vocab_size
        self.attention = self.manifest.attention
        self.identity = {"cache": self.manifest.fingerprint}
        self._made_for = self.manifest.splits[split].packed
        self._numbers: np.ndarray | None = None
        self._top_k: int | None = None
        self._shards = self.manifest.splits[split].shards
        self._starts = np.cumsum([0] + [shard.rows for shard in self._shards])
        self.length = self.manifest.max_length
        self._open_files: dict[int, Any] = {}
        self._owner = os.getpid()
        common = {"split": split, "max_length": self.length, "codec": self.manifest.codec}
        check_shards(self.folder, self._shards, self._facts, **common)

    def __len__(self) -> int:
        """Number of cached rows."""
        return int(self._starts[-1])

    def check(self, rows: PackedDataset) -> None:
        """Refuse packed rows these targets were not made from.

        Raises:
            MismatchError: dataset, tokenizer or sequence length differ; both values are named.
        """
        again = "Use the cache's own data, or make the cache again for this data into another folder."
        for what, cached, found in (
            ("rows of {} tokens", self.length, rows.max_length),
            ("tokenizer {:.12}", self.manifest.tokenizer, rows.manifest.tokenizer.hash),
            ("packed dataset {:.12}", self._made_for, rows.fingerprint),
        ):
            if cached != found:
                raise MismatchError(
                    f"{self.folder} was made for {what.format(cached)} and this run has {what.format(found)}. {again}"
                )

    def for_rows(self, rows: PackedDataset) -> "TeacherCache":
        """This cache, read by the numbers that `rows` go by: all its rows, or some of them.

        Raises:
            MismatchError: it was made for other rows, or holds too few of them.
        """
        if rows.fingerprint == self._made_for or rows.fingerprint_of(len(self)) != self._made_for:
            self.check(rows)
            return self
        held = {int(place): number for number, place in enumerate(rows.places(len(self)))}
        wanted = [int(place) for place in rows.places()]
        missing = sum(place not in held for place in wanted)
        if missing:
            raise MismatchError(
                f"{self.folder} holds {len(self)} evenly spaced rows of {rows.folder}, and {missing} of the "
                f"{len(wanted)} rows of this run are not among them. Use as many rows as it holds (or a number that "
                "divides theirs), or make the cache again into another folder."
            )
        view = copy.copy(self)
        view._numbers, view._made_for = np.array([held[place] for place in wanted]), rows.fingerprint
        return view

    def narrowed(self, top_k: int | None, temperatures: tuple[float, ...] | None) -> "TeacherCache":
        """This cache with fewer ids and temperatures; None for those it has.

        Raises:
            MismatchError: it does not have so many.
        """
        if top_k is not None and top_k > self.spec.top_k:
            raise MismatchError(
                f"{self.folder} keeps {self.spec.top_k} ids a position and teacher.top_k is {top_k}. Set --top-k "
                f"{self.spec.top_k}, or make the cache again into another folder."
            )
        if top_k is not None and top_k < self.spec.top_k and self.spec.sampling_temperature is not None:
            raise MismatchError(
                f"{self.folder} keeps {self.spec.top_k} drawn ids a position, of which none can be left out, and "
                f"teacher.top_k is {top_k}. Leave it out."
            )
        absent = [value for value in temperatures or () if value not in self.temperatures]
        if absent:
            raise MismatchError(
                f"{self.folder} has normalisers at temperatures {list(self.temperatures)} and this run wants "
                f"{absent[0]}. Use one of these, or make the cache again into another folder."
            )
        view = copy.copy(self)
        view._top_k = top_k if top_k is not None and top_k < self.spec.top_k else None
        view.temperatures = temperatures or self.temperatures
        return view

    def template(self) -> SparseTargets:
        """Empty targets with this cache's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.spec.sampling_temperature)

    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets of the rows, by their `row_ids`."""
        numbers = rows.row_ids.tolist()
        return self.read(numbers if self._numbers is None else self._numbers[numbers].tolist())

    def read(self, row_ids: Sequence[int]) -> SparseTargets:
        """Targets `[B, T, ...]` of the given rows, in the order given.

        Raises:
            IndexError: a row the cache does not hold.
            CorruptError: HDF5 cannot read a shard.
        """
        found = (self._read_row(row) for row in row_ids)
        return concatenate([targets.narrowed(self._top_k, self.temperatures) for targets in found])

    def _read_row(self, row: int) -> SparseTargets:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.folder}; items need the `row_id` of their packed row")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        offset = (row - int(self._starts[shard])) * self.length
        file = self._file(shard)
        try:
            sections = {name: file[name][offset : offset + self.length] for name in file}
        except OSError as error:
            raise CorruptError(
                f"{file.filename} cannot be read ({error}). Make {self.folder} again with --force."
            ) from error
        for name in ("low", "bits"):  # empty sections are not stored
            sections.setdefault(name, np.zeros((self.length, 0), dtype=np.uint8))
        targets = decode(sections, self.spec)
        return targets.with_tensors({name: tensor.unsqueeze(0) for name, tensor in targets.tensors().items()})

    def _facts(self, path: Path) -> dict[str, Any]:
        """What a shard says of itself; its rows are counted."""
        import h5py

        with h5py.File(path, "r") as file:
            told = file.attrs.get(SHARD_FACTS)
            return {**(json.loads(told) if told else {}), "rows": len(file["levels"]) // self.length}

    def _file(self, shard: int) -> Any:
        if self._owner != os.getpid():  # a forked worker: HDF5 handles do not survive a fork
            self._open_files, self._owner = {}, os.getpid()
        if shard not in self._open_files:
            import h5py

            self._open_files[shard] = h5py.File(inside(self.folder, self._shards[shard].file), "r")
        return self._open_files[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind: a spawned worker opens the shards itself."""
        return {**self.__dict__, "_open_files": {}}
