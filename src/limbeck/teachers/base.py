"""What every teacher is: packed rows in, SparseTargets out.

The one idea: whoever needs targets (the trainer, the cache, the evaluation) knows only this class, so a
teacher in this process, on disk or behind HTTP gives the same loss to within its stated error.

Example of the contract, for rows [B, T]:

    rows = dataset.rows([0, 1])             # PackedRows, [2, T]
    targets = teacher.targets(rows)         # SparseTargets, leading shape [2, T]
    targets.token_ids[b, t]                 # support of the distribution of token t+1 of row b
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.errors import ConfigError
from limbeck.losses.router import Routing
from limbeck.targets.reference import Reference
from limbeck.targets.sparse import SparseTargets


class Teacher(ABC):
    """Predicts the next token of every position of packed rows.

    Attributes:
        temperatures: the declared temperatures of its targets.
        vocab_size: ids it gives probability to.
        attention: per_document or packed, what its targets are made with; None: it does not say.
        identity: what it is known by, as a cache's manifest and a run's provenance record it.
        in_workers: True when `targets` is file reading, fit for data loader workers (it must then survive pickling);
            False when it computes on a device or waits for another machine.
        ahead: batches worth asking for before they are needed; 0: it is asked for each in turn.
        hint_when_slow: what its user can do when a run waits for it; None: nothing but caching.
        model: its causal LM where that is in this process, for scores of the teacher itself.
        routings: what its routers decided for the last rows, one a layer, once `watch_routers` was called.
    """

    temperatures: tuple[float, ...]
    vocab_size: int
    attention: str | None = None
    identity: dict[str, Any] | None = None
    in_workers: bool = False
    ahead: int = 0
    hint_when_slow: str | None = None
    model: Any = None
    routings: Sequence[Routing] | None = None

    @abstractmethod
    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets of the rows, leading shape [B, T], aligned so that row t speaks of token t+1."""

    @abstractmethod
    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""

    def check(self, rows: PackedDataset) -> None:  # noqa: B027 (most predict whatever they are given)
        """Refuse rows that it has no targets for.

        Raises:
            MismatchError: names what the targets were made for and what the rows are.
        """

    def reference(self, rows: PackedRows) -> Reference | None:
        """The whole distributions of the rows, for scores that must not depend on the stored ids; None: not known."""
        return None

    def watch_routers(self) -> None:
        """Keep from now on what the routers decide.

        Raises:
            ConfigError: it cannot tell.
        """
        raise ConfigError(
            f"loss.objectives names router_kd, which reads the teacher's routers, and a {type(self).__name__} does not "
            "have them. Run the teacher in this process: teacher.model with teacher.use_cached_logits: false."
        )

    def submit(self, rows: PackedRows) -> "Future[SparseTargets]":
        """Start on the rows; cancelling the future drops them. A teacher that computes here answers at once."""
        future: Future[SparseTargets] = Future()
        try:
            future.set_result(self.targets(rows))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Drop what is on its way, and whatever is held."""


def targets_in_turn(teacher: Teacher, batches: Iterable[PackedRows]) -> Iterator[tuple[PackedRows, SparseTargets]]:
    """Each batch with its targets, in order; a teacher that works elsewhere is at the next while one is used."""
    asked: deque[tuple[PackedRows, Future[SparseTargets]]] = deque()
    for rows in batches:
        asked.append((rows, teacher.submit(rows)))
        if len(asked) > min(teacher.ahead, 1):
            earlier, answer = asked.popleft()
            yield earlier, answer.result()
    for earlier, answer in asked:
        yield earlier, answer.result()
