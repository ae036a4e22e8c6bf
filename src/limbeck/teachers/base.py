"""The Teacher protocol: packed rows in, SparseTargets out.

The one idea: whoever needs targets (the trainer, the cache, the evaluation) knows only this interface, so a
teacher in this process, on disk or behind HTTP gives the same loss to within its stated error.

Example of the contract, for rows [B, T]:

    rows = dataset.rows([0, 1])             # PackedRows, [2, T]
    targets = teacher.targets(rows)         # SparseTargets, leading shape [2, T]
    targets.token_ids[b, t]                 # support of the distribution of token t+1 of row b
"""

from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from limbeck.data.dataset import PackedRows
from limbeck.targets.reference import Reference
from limbeck.targets.sparse import SparseTargets


@runtime_checkable
class Teacher(Protocol):
    """Predicts the next token of every position of packed rows.

    Attributes:
        temperatures: the declared temperatures of its targets.
        vocab_size: ids it gives probability to.
        in_workers: True when `targets` is file reading, fit for data loader workers; False when it computes
            on a device and belongs in the training process.
    """

    temperatures: tuple[float, ...]
    vocab_size: int
    in_workers: bool

    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets of the rows, leading shape [B, T], aligned so that row t speaks of token t+1."""

    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""


@runtime_checkable
class DenseTeacher(Teacher, Protocol):
    """A teacher that can give its whole distribution, for scores that must not depend on the stored ids."""

    def reference(self, rows: PackedRows) -> Reference:
        """The distributions of the rows."""


@runtime_checkable
class AsyncTeacher(Teacher, Protocol):
    """A teacher that works elsewhere, so that several batches can be asked for at once.

    Attributes:
        ahead: batches worth asking for before they are needed; 0: none.
    """

    ahead: int

    def submit(self, rows: PackedRows) -> "Future[SparseTargets]":
        """Start on the rows; cancelling the future drops them."""

    def close(self) -> None:
        """Drop what is on its way, and the connections."""
