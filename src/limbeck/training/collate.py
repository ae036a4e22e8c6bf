"""Rows to a batch, with the teacher's targets when they can be read in the loader's workers.

The one idea: a batch is `row_ids`, `input_ids`, `doc_ids`, the shifted labels, and (for a cached teacher)
the tensors of SparseTargets under `targets`; the trainer needs nothing else.
"""

import signal
from collections.abc import Sequence
from typing import Any

import torch

from limbeck.data.dataset import IGNORE, PackedRows
from limbeck.teachers.base import Teacher


class RowCollator:
    """Collate items with `input_ids`, and optionally `doc_ids`, `row_id`, `labels`.

    Items may differ in length: shorter ones are filled up with `pad_id`, which carries no loss. `labels`
    follow the Hugging Face convention (aligned with `input_ids`, -100 where there is no loss) and only take
    loss away; without them every next token of the same document counts. Padding in front of a row is moved behind
    it: plain causal attention would see it there.
    """

    def __init__(self, teacher: Teacher | None = None, pad_id: int = 0) -> None:
        self._teacher = teacher if teacher is not None and teacher.in_workers else None
        self._pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, as a dict of tensors [B, T]."""
        if torch.utils.data.get_worker_info() is not None:  # Ctrl-C is the trainer's, which ends its loader's processes
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        ids = [torch.as_tensor(item["input_ids"]) for item in items]
        docs = [self._documents(item, len(row)) for item, row in zip(items, ids, strict=True)]
        padding = [_leading_padding(row) for row in docs]
        ids, docs = ([row[skip:] for row, skip in zip(rows, padding, strict=True)] for rows in (ids, docs))
        length = max(len(item["input_ids"]) for item in items)
        rows = PackedRows(
            row_ids=torch.tensor([int(item.get("row_id", -1)) for item in items]),
            input_ids=torch.stack([_filled_up(row, length, self._pad_id) for row in ids]),
            doc_ids=torch.stack([_filled_up(row, length, -1) for row in docs]),
        )
        labels = rows.labels
        if "labels" in items[0]:
            kept = (torch.as_tensor(item["labels"])[skip:] for item, skip in zip(items, padding, strict=True))
            given = torch.stack([_filled_up(row, length, IGNORE) for row in kept])
            labels[:, :-1][given[:, 1:] == IGNORE] = IGNORE
        batch: dict[str, Any] = {
            "row_ids": rows.row_ids,
            "input_ids": rows.input_ids,
            "doc_ids": rows.doc_ids,
            # The Trainer counts the loss's positions of the whole accumulated batch in `shift_labels`.
            "labels": labels,
            "shift_labels": labels,
        }
        if self._teacher is not None:
            batch["targets"] = self._teacher.targets(rows).tensors()
        return batch

    @staticmethod
    def _documents(item: dict[str, Any], length: int) -> torch.Tensor:
        if "doc_ids" in item:
            return torch.as_tensor(item["doc_ids"])
        mask = item.get("attention_mask")
        docs = torch.zeros(length, dtype=torch.long)
        return docs if mask is None else torch.where(torch.as_tensor(mask).bool(), docs, -1)


def _leading_padding(docs: torch.Tensor) -> int:
    """Places before a row's first token; 0 for a row that is padding alone."""
    used = (docs >= 0).nonzero()
    return int(used[0]) if len(used) else 0


def _filled_up(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row.long(), (0, length - len(row)), value=value)
