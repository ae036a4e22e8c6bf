"""Packed rows read back: any row in any order, checked against the manifest.

The one idea: a row is `input_ids` and `doc_ids`; labels, positions and the loss mask follow from them in
`PackedRows`, the one batch type that teachers, the trainer and the evaluation share.

Shapes: B rows, T tokens in a row.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.data.tokenizer import LoadedTokenizer, require_same
from limbeck.errors import CorruptError, MismatchError
from limbeck.manifests import PackedManifest, ShardRecord
from limbeck.storage import fingerprint, inside, sha256_file_cached

IGNORE = -100
#: The key under which a shard, Parquet or HDF5, says which rows it holds.
SHARD_FACTS = "limbeck"
_IN_MEMORY_BYTES = 1 << 29
_CACHED_GROUPS = 64


@dataclass(frozen=True)
class PackedRows:
    """A batch of packed rows.

    `row_ids` [B] are the rows' numbers in their split; `doc_ids` [B, T] give each token's document, -1
    where the row is filled up.
    """

    row_ids: torch.Tensor
    input_ids: torch.Tensor
    doc_ids: torch.Tensor

    @classmethod
    def from_batch(cls, batch: Mapping[str, torch.Tensor]) -> "PackedRows":
        """The rows of a data loader's batch."""
        return cls(batch["row_ids"], batch["input_ids"], batch["doc_ids"])

    @property
    def labels(self) -> torch.Tensor:
        """Next token of each position [B, T]; -100 where it is another document's, filler, or absent."""
        labels = torch.full_like(self.input_ids, IGNORE)
        same = (self.doc_ids[:, 1:] == self.doc_ids[:, :-1]) & (self.doc_ids[:, 1:] >= 0)
        labels[:, :-1] = torch.where(same, self.input_ids[:, 1:], IGNORE)
        return labels

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions [B, T] that restart at 0 with each document; block-causal attention follows from them."""
        index = torch.arange(self.doc_ids.shape[1], device=self.doc_ids.device).expand_as(self.doc_ids)
        starts = torch.ones_like(self.doc_ids, dtype=torch.bool)
        starts[:, 1:] = self.doc_ids[:, 1:] != self.doc_ids[:, :-1]
        return index - torch.where(starts, index, 0).cummax(dim=1).values

    def model_inputs(self, attention: str) -> dict[str, Any]:
        """Arguments of a causal LM's forward for `attention: per_document | packed`.

        `use_cache=False` is part of it: with a key/value cache transformers does not derive the block-causal
        mask from the positions, and documents would silently see each other.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if attention == "per_document":
            inputs["position_ids"] = self.position_ids
        return inputs

    def to(self, device: torch.device | str) -> "PackedRows":
        """The same rows on another device."""
        return PackedRows(self.row_ids.to(device), self.input_ids.to(device), self.doc_ids.to(device))

    def slice(self, start: int, stop: int) -> "PackedRows":
        """Rows `start` to `stop` of the batch."""
        return PackedRows(self.row_ids[start:stop], self.input_ids[start:stop], self.doc_ids[start:stop])


def shard_facts(split: str, first_row: int, rows: int, max_length: int) -> dict[str, Any]:
    """Which rows a shard holds: kept inside it, so that a manifest can not give it those of another."""
    return {"split": split, "first_row": first_row, "rows": rows, "max_length": max_length}


class PackedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of one split of a folder made by `limbeck data pack`.

    Small splits are read into memory when first used; larger ones row group by row group. Items are dicts
    with `row_id` (int), `input_ids` and `doc_ids` (`[T]` int64 tensors). `max_rows` keeps that many rows,
    evenly spaced over the split; their numbers are then 0 … max_rows − 1.

    Raises:
        IncompleteError: the folder is unfinished.
        CorruptError: a shard is missing, truncated or altered, or holds other rows than the manifest says.
    """

    def __init__(self, folder: Path | str, split: str = "train", max_rows: int | None = None) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = PackedManifest.read(self.folder)
        self._shards = self.manifest.splits[split].shards
        self._starts = np.cumsum([0] + [shard.rows for shard in self._shards])
        self.max_length = self.manifest.max_length
        self._total = int(self._starts[-1])
        self._length = min(self._total, max_rows or self._total)
        self._files: dict[int, Any] = {}
        check_shards(self.folder, self._shards, self._facts, split=split, max_length=self.max_length)
        self._memory: np.ndarray | None = None
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of what the rows were packed from, and of how many of them are used."""
        return self.fingerprint_of(self._length)

    def fingerprint_of(self, count: int) -> str:
        """The fingerprint of `count` rows of the whole split, evenly spaced."""
        packed = str(self.manifest.fingerprint)
        return packed if count >= self._total else fingerprint([packed, count])

    def places(self, count: int | None = None) -> np.ndarray:
        """Where in the whole split the rows stand, `[len(self)]`; with `count` where that many would."""
        count = self._length if count is None else count
        return np.arange(count) * self._total // max(count, 1)

    def check(self, tokenizer: LoadedTokenizer | None = None, max_length: int | None = None) -> None:
        """Refuse rows of another tokenizer or another length, naming both values."""
        if tokenizer is not None:
            require_same(self.manifest.tokenizer, tokenizer, f"{self.folder}", "this run")
        if max_length is not None and max_length != self.max_length:
            raise MismatchError(
                f"{self.folder} is packed in rows of {self.max_length} tokens and dataset.max_length is {max_length}. "
                "Set max_length to the packed length, or pack again into another folder."
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row_id": index, **self._tensors(self._row(index))}

    def rows(self, indices: Sequence[int]) -> PackedRows:
        """A batch of the given rows."""
        data = torch.from_numpy(np.stack([self._row(index) for index in indices])).long()
        return PackedRows(torch.tensor(list(indices)), data[:, 0], data[:, 1])

    @staticmethod
    def _tensors(row: np.ndarray) -> dict[str, torch.Tensor]:
        data = torch.from_numpy(row).long()
        return {"input_ids": data[0], "doc_ids": data[1]}

    def _row(self, index: int) -> np.ndarray:
        """One row as `[2, T]` int32: ids and documents."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        index = index * self._total // self._length
        if self._total * self.max_length * 8 <= _IN_MEMORY_BYTES:
            if self._memory is None:
                parts = [_columns(self._open(number).read(), self.max_length) for number in range(len(self._shards))]
                self._memory = np.concatenate(parts)
            return np.array(self._memory[index])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        group, offset = divmod(index - int(self._starts[shard]), 64)
        if (shard, group) not in self._groups:
            table = self._open(shard).read_row_group(group)
            self._groups[shard, group] = _columns(table, self.max_length)
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        return np.array(self._groups[shard, group][offset])

    @staticmethod
    def _facts(path: Path) -> dict[str, Any]:
        """What a shard says of itself; its rows are counted."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            told = (file.schema_arrow.metadata or {}).get(SHARD_FACTS.encode())
            return {**(json.loads(told) if told else {}), "rows": file.metadata.num_rows}

    def _open(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._files:
            self._files[number] = pq.ParquetFile(inside(self.folder, self._shards[number].file))
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the files themselves."""
        return {**self.__dict__, "_files": {}, "_groups": OrderedDict()}


def _columns(table: Any, length: int) -> np.ndarray:
    """Columns of a Parquet table as `[rows, 2, T]` int32."""
    parts = []
    for name in ("input_ids", "doc_ids"):
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(name).chunks]
        parts.append(np.concatenate(chunks).reshape(-1, length))
    return np.stack(parts, axis=1)


def check_file(folder: Path, name: str, sha256: str) -> None:
    """Refuse a file that is missing or whose bytes are not those the manifest recorded."""
    path = inside(folder, name)
    if not path.is_file():
        raise CorruptError(f"{path} is named in the manifest and missing. Make {folder} again with --force.")
    found = sha256_file_cached(path)
    if found != sha256:
        raise CorruptError(
            f"{path} is damaged: its SHA-256 is {found[:12]} and the manifest says {sha256[:12]}. "
            f"Make {folder} again with --force."
        )


def check_shards(
    folder: Path, shards: Sequence[ShardRecord], facts: Callable[[Path], dict[str, Any]], **common: Any
) -> None:
    """Refuse shards that are missing, altered, or say of themselves something else than the manifest says of them.

    Args:
        folder: where they lie.
        shards: their records in the manifest, in the order of their rows.
        facts: reads what a shard says of itself, and closes it again: there may be more than a process may open.
        common: what all of them should say.

    Raises:
        CorruptError: names the first difference; a shard of an earlier limbeck says nothing.
    """
    first_row = 0
    for shard in shards:
        check_file(folder, shard.file, shard.sha256)
        path = folder / shard.file
        told, wanted = facts(path), {"first_row": first_row, "rows": shard.rows, **common}
        for key, value in wanted.items():
            if told.get(key) != value:
                raise CorruptError(
                    f"{path} says {key} {told.get(key)} of itself, and by the manifest it should be {value}: the "
                    f"manifest was edited, shards were exchanged, or another version wrote it. Make {folder} again "
                    "with --force."
                )
        first_row += shard.rows
