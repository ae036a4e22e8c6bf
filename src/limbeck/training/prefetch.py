"""Ask a teacher elsewhere for the next micro-batches while the student works on this one.

The one idea: an iterator around the data loader's that stays some batches ahead of the trainer; each batch it hands
out, in order, carries the future of its targets. Requests run in the teacher's own thread, outside the loader's
workers; at most `ahead` are on their way.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from limbeck.data.dataset import PackedRows
from limbeck.teachers.base import Teacher

PENDING = "pending_targets"


class TargetsAhead:
    """Batches whose targets have been asked for.

    Args:
        batches: the data loader's iterator; batches hold `row_ids`, `input_ids`, `doc_ids`.
        teacher: who is asked.

    Example:
        >>> for batch in TargetsAhead(iter(loader), teacher):
        ...     targets = batch["pending_targets"].result()
    """

    def __init__(self, batches: Iterator[dict[str, Any]], teacher: Teacher) -> None:
        self.source, self._teacher = batches, teacher
        self._queue: deque[dict[str, Any]] = deque()

    def __iter__(self) -> "TargetsAhead":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch; the queue is filled up first, so that its request is never the only one."""
        while len(self._queue) < max(1, self._teacher.ahead):
            try:
                batch = next(self.source)
            except StopIteration:
                break
            rows = PackedRows.from_batch(batch)
            self._queue.append({**batch, PENDING: self._teacher.submit(rows)})
        if not self._queue:
            raise StopIteration
        return self._queue.popleft()

    def close(self) -> None:
        """Cancel what nobody will use."""
        while self._queue:
            self._queue.popleft()[PENDING].cancel()
