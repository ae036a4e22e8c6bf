"""The cache on disk: HDF5 shards of coded targets, written crash-safe, read lazily.

The one idea: a shard is a fixed range of packed rows, so every shard can be made alone, by any rank, and
made again with the same bytes. It is written under a temporary name, fsynced and renamed; the journal
records it with its checksum; `manifest.json` comes when all shards are there.

    cache/ inputs.json  train-00000.h5 …  validation-00000.h5 …  manifest.json

Shapes: B rows, T positions a row, K support.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.dataset import SHARD_FACTS, PackedDataset, PackedRows, check_shards, shard_facts
from limbeck.errors import CorruptError, LimbeckError, MismatchError
from limbeck.manifests import CacheManifest
from limbeck.storage import commit_file, inside, read_json, sha256_file, write_json
from limbeck.targets.codec import CODEC_VERSION, CodecSpec, RoundTrip, decode, encode, measure
from limbeck.targets.sparse import SparseTargets, concatenate

_POSITIONS_PER_CHUNK = 1024


def write_shard(
    path: Path,
    targets: SparseTargets,
    spec: CodecSpec,
    *,
    split: str = "train",
    first_row: int = 0,
    compression: str = "gzip",
    max_kl: float = 1e-4,
) -> tuple[dict[str, Any], RoundTrip]:
    """Code targets `[B, T, ...]` into an HDF5 file; returns its record for the manifest and what coding cost.

    Args:
        path: the shard.
        targets: of rows `first_row` … of `split`.
        spec: the codec.
        split, first_row: kept in the file.
        compression: gzip or none.
        max_kl: largest cost in nats.

    Raises:
        LimbeckError: the measured round trip costs more than `max_kl` nats; nothing is left on disk.
        OSError: it can not be written.
    """
    import h5py

    rows, length = targets.token_ids.shape[:2]
    flat = targets.to("cpu").flatten()
    sections = encode(flat, spec)
    loss = measure(flat, decode(sections, spec))
    if loss.worst_kl > max_kl:
        raise LimbeckError(
            f"coding the targets costs {loss.worst_kl:.2e} nats (mean KL) and teacher.max_kl is {max_kl:.2e}. "
            "Raise teacher.top_k or teacher.max_kl, or train with teacher.use_cached_logits: false."
        )
    temporary = path.with_name(f".{path.name}.tmp")
    chunk = max(1, _POSITIONS_PER_CHUNK // length) * length
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compression == "gzip" else {}
    # Made in memory: HDF5 does not survive a disk that fills up under it.
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="latest") as file:
        file.attrs[SHARD_FACTS] = json.dumps(
            {**shard_facts(split, first_row, rows, length), "codec": codec_record(spec)}, sort_keys=True
        )
        for name, value in sections.items():
            if value.size:
                chunks = (min(chunk, len(value)), *value.shape[1:])
                file.create_dataset(name, data=value, chunks=chunks, track_times=False, **options)
        file.flush()
        image = file.id.get_file_image()
    try:
        temporary.write_bytes(image)
        commit_file(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return {"file": path.name, "rows": rows, "sha256": sha256_file(path), "bytes": path.stat().st_size}, loss


def codec_record(spec: CodecSpec) -> dict[str, Any]:
    """The codec's parameters as JSON, with its version."""
    return {"version": CODEC_VERSION, **asdict(spec), "temperatures": list(spec.temperatures)}


class ShardJournal:
    """Which shards are finished; one file a writing process, merged when all are."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._path = folder, folder / f".progress-{rank}.json"
        self._own: dict[str, Any] = read_json(self._path) if self._path.exists() else {}

    def add(self, record: dict[str, Any]) -> None:
        """Record a shard that is in place."""
        self._own[record["file"]] = record
        write_json(self._path, self._own)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records of all processes' shards whose files are there, by file name."""
        merged: dict[str, Any] = {}
        for path in sorted(self._folder.glob(".progress-*.json")):
            merged.update(read_json(path))
        return {name: record for name, record in merged.items() if (self._folder / name).is_file()}

    def remove(self) -> None:
        """Delete the journals, once the manifest has taken over."""
        for path in self._folder.glob(".progress-*.json"):
            path.unlink(missing_ok=True)


class TeacherCache:
    """Cached targets of one split: a `Teacher` that reads instead of computing.

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

    def check(self, rows: PackedDataset, attention: str) -> None:
        """Refuse packed rows these targets were not made from.

        Raises:
            MismatchError: dataset, tokenizer, sequence length or attention differ; both values are named.
        """
        again = "Use the cache's own data, or make the cache again for this data into another folder."
        recorded = self.manifest.splits[self.split].packed
        for what, cached, found in (
            ("rows of {} tokens", self.length, rows.max_length),
            ("tokenizer {:.12}", self.manifest.tokenizer, rows.manifest.tokenizer.hash),
            ("packed dataset {:.12}", recorded, rows.fingerprint),
            ("attention {}", self.manifest.attention, attention),
        ):
            if cached != found:
                raise MismatchError(
                    f"{self.folder} was made for {what.format(cached)} and this run has {what.format(found)}. {again}"
                )

    def template(self) -> SparseTargets:
        """Empty targets with this cache's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.spec.sampling_temperature)

    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets of the rows, by their `row_ids`."""
        return self.read(rows.row_ids.tolist())

    def read(self, row_ids: Sequence[int]) -> SparseTargets:
        """Targets `[B, T, ...]` of the given rows, in the order given.

        Raises:
            IndexError: a row the cache does not hold.
            CorruptError: HDF5 cannot read a shard.
        """
        return concatenate([self._read_row(row) for row in row_ids])

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
