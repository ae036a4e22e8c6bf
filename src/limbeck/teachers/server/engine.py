"""One thread that owns the model, and a queue in front of it.

The one idea: whatever waits is run together. The first job in line takes with it every later one that asks for the
same kind of targets, up to a budget of tokens; a job that wants to be reproducible runs alone, because the bits of a
matrix product depend on what else is in the batch.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.config import SamplingConfig
from limbeck.data.dataset import PackedRows
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.local import LocalTeacher


class BusyError(Exception):
    """The queue is full; `retry_after` seconds will empty it."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many tokens are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Request:
    """What one caller wants of its rows.

    Attributes:
        top_k, temperatures, attention, sampling, sampling_temperature: as for `LocalTeacher`.
        logits: whole logits instead of targets.
        alone: share no forward pass with other jobs.
    """

    top_k: int | None = None
    temperatures: tuple[float, ...] = (1.0,)
    attention: str = "per_document"
    sampling: SamplingConfig | None = None
    sampling_temperature: float | None = None
    logits: bool = False
    alone: bool = False

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind can share a pass."""
        return (self.top_k, self.temperatures, self.attention, self.logits, str(self.sampling))


@dataclass(eq=False)
class _QueuedRequest:
    rows: PackedRows
    request: Request
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return self.rows.input_ids.numel()


class Engine:
    """Runs jobs on a model, one pass after another.

    Args:
        teacher: the model.
        max_batch_tokens: tokens of jobs that are run together.
        max_queue_tokens: tokens that may wait.
        observe: called after each pass with jobs, tokens and seconds.
    """

    def __init__(
        self, teacher: LocalTeacher, max_batch_tokens: int, max_queue_tokens: int, observe: Any = lambda *_: None
    ) -> None:
        self._teacher, self._budget, self._limit, self._observe = teacher, max_batch_tokens, max_queue_tokens, observe
        self._queue: deque[_QueuedRequest] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._rate = 2000.0  # tokens a second, as last seen
        self._thread = threading.Thread(target=self._work, name="limbeck-engine", daemon=True)
        self._thread.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        with self._wake:
            return sum(job.tokens for job in self._queue)

    def submit(self, rows: PackedRows, request: Request) -> "Future[Any]":
        """Queue rows `[B, T]`; the future gives SparseTargets `[B, T, ...]` or logits `[B, T, V]`.

        Raises:
            BusyError: the queue is full, or the engine is closing.
        """
        job = _QueuedRequest(rows, request)
        with self._wake:
            held = sum(other.tokens for other in self._queue)
            if self._closing or (self._queue and held + job.tokens > self._limit):
                raise BusyError(retry_after=max(1, min(60, round(held / self._rate))))
            self._queue.append(job)
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Finish what is queued, take nothing more."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if not jobs:
                continue
            started, tokens = time.perf_counter(), sum(job.tokens for job in jobs)
            try:
                results = self._run(jobs)
            except Exception as error:
                for job in jobs:
                    job.future.set_exception(error)
            else:
                for job, result in zip(jobs, results, strict=True):
                    job.future.set_result(result)
            seconds = max(time.perf_counter() - started, 1e-6)
            self._rate = 0.8 * self._rate + 0.2 * tokens / seconds
            self._observe(len(jobs), tokens, seconds)

    def _next(self) -> list[_QueuedRequest] | None:
        """The jobs of the next pass, None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: bool(self._queue) or self._closing)
            if not self._queue:
                return None
            first = self._queue.popleft()
            jobs = [first]
            if first.request.alone:
                return jobs
            count, longest = first.rows.input_ids.shape
            left: deque[_QueuedRequest] = deque()
            for job in self._queue:
                rows, length = job.rows.input_ids.shape
                fits = (count + rows) * max(longest, length) <= self._budget
                if fits and not job.request.alone and job.request.kind == first.request.kind:
                    count, longest = count + rows, max(longest, length)
                    jobs.append(job)
                else:
                    left.append(job)
            self._queue = left
            return jobs

    def _run(self, jobs: list[_QueuedRequest]) -> list[Any]:
        request = jobs[0].request
        wanted = (request.top_k, request.temperatures, request.attention, request.sampling)
        teacher = self._teacher.with_spec(TargetSpec(*wanted, request.sampling_temperature))
        rows = merge([job.rows for job in jobs])
        found = teacher.logits(rows) if request.logits else teacher.targets(rows).to("cpu")
        results, start = [], 0
        for job in jobs:
            count, length = job.rows.input_ids.shape
            results.append(_part(found, start, start + count, length))
            start += count
        return results


def merge(parts: list[PackedRows]) -> PackedRows:
    """Rows of several jobs as one batch, shorter ones filled up with a document of their own."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.input_ids.shape[1] for part in parts)

    def fill(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors])

    return PackedRows(
        torch.cat([part.row_ids for part in parts]),
        fill([part.input_ids for part in parts], 0),
        fill([part.doc_ids for part in parts], -1),
    )


def _part(found: Any, start: int, stop: int, length: int) -> Any:
    if isinstance(found, SparseTargets):
        return found.with_tensors({name: t[start:stop, :length] for name, t in found.tensors().items()})
    return found[start:stop, :length]
