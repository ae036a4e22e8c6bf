"""Continuous batching: texts of several callers carried on together, a token each a step.

The one idea: one thread owns the engine; each of its steps takes one token of every text that is being written, and as
much of waiting prompts as still fits. The engine gives each text what it would get alone, and each has random numbers
of its own, so what a caller gets depends on nobody else.

A finished text stays in memory for a while: a prompt that begins like it, or like one that is being written, goes on
from there instead of being read again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from limbeck.console import warn
from limbeck.serving.model import GgufModel, Line
from limbeck.serving.sampling import Array, Sampling, draw

_SHORTEST_PREFIX = 16  # tokens; fewer are read faster than they are copied
_KEPT_LINES = 8


class QueueFullError(Exception):
    """As many texts wait as may; `retry_after` seconds are likely to change that."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} texts are waiting already; try again")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Written:
    """One token of a text.

    Attributes:
        token: its id; None: there is no token, the text has ended.
        logprob: its log-probability under the model at temperature 1, where asked for.
        top: ids and log-probabilities of the likeliest, where asked for.
        reason: why the text ends with this: stop, length, cancelled, error; None: it goes on.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: str | None = None


@dataclass(eq=False)
class Job:
    """One text.

    Attributes:
        prompt: ids that it goes on from.
        sampling: how tokens are chosen.
        most: new tokens at most.
        stops: ids that end it.
        told: called with each `Written`, from the scheduler's thread.
        top: how many of the likeliest ids are told with each token; None: no log-probabilities.
        echo: log-probabilities of the prompt's tokens are told first, one `Written` each.
    """

    prompt: Sequence[int]
    sampling: Sampling
    most: int
    stops: frozenset[int]
    told: Callable[[Written], None]
    top: int | None = None
    echo: bool = False
    cancelled: bool = False
    line: Line | None = None
    tokens: list[int] = field(default_factory=list)  # what the line has read
    pending: list[int] = field(default_factory=list)  # what it is to read next
    made: list[int] = field(default_factory=list)
    began: float = 0.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)


class Scheduler:
    """Runs jobs until it is closed.

    Args:
        model: the model; nobody else uses its engine.
        most_active: texts that are written at once.
        most_waiting: texts that wait at most.
        batch_tokens: tokens of one step.
        observe: called after each step with its texts, tokens and seconds.
    """

    def __init__(
        self,
        model: GgufModel,
        most_active: int,
        most_waiting: int,
        batch_tokens: int,
        observe: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self._model, self._observe = model, observe
        self._most_active, self._most_waiting, self._batch = most_active, most_waiting, batch_tokens
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._kept: deque[tuple[list[int], Line]] = deque()
        self._changed = threading.Condition()
        self._closing = self._draining = False
        self._seconds_a_text = 1.0
        self._thread = threading.Thread(target=self._run, name="limbeck-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Texts that are being written."""
        return len(self._active)

    def cache_bytes(self) -> int:
        """Memory of all texts, kept ones too."""
        with self._changed:
            lines = [job.line for job in self._active] + [line for _, line in self._kept]
        return sum(line.bytes() for line in lines if line is not None)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs on, all or none.

        Raises:
            QueueFullError: too many wait, or the server is stopping.
        """
        with self._changed:
            room = self._most_active - len(self._active) + self._most_waiting
            if self._draining or len(self._waiting) + len(jobs) > room:
                rounds = 1 + len(self._waiting) // self._most_active
                raise QueueFullError(len(self._waiting), max(1, round(rounds * self._seconds_a_text)))
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job: its place is free with the next step."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self, seconds: float = 30.0) -> None:
        """Take nothing new, finish what is there within the time, and stop."""
        with self._changed:
            self._draining = True
            self._changed.notify()
        deadline = time.monotonic() + seconds
        while (self._active or self._waiting) and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._active or self._waiting):
                    self._changed.wait()
                if self._closing:
                    left = [*self._active, *self._waiting]
                    self._active, self._waiting = [], deque()
                    break
                self._admit()
            try:
                self._step()
            except Exception as error:  # a step that failed ends its texts, and nothing else
                warn(f"a step of the engine failed: {type(error).__name__}: {error}")
                for job in list(self._active):
                    self._finish(job, "error", keep=False)
        for job in left:
            job.told(Written(None, reason="cancelled"))

    def _admit(self) -> None:
        """Move waiting jobs to free places; the lock is held."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            job.told(Written(None, reason="cancelled"))
        while self._waiting and len(self._active) < self._most_active:
            job = self._waiting.popleft()
            job.rng, job.began = np.random.default_rng(job.sampling.seed), time.monotonic()
            known, job.line = (0, self._model.line()) if job.echo else self._begin(job.prompt)
            job.tokens, job.pending = list(job.prompt[:known]), list(job.prompt[known:])
            self._active.append(job)

    def _begin(self, prompt: Sequence[int]) -> tuple[int, Line]:
        """How many of the prompt's tokens are read already, and a line that has read them."""
        best, source, kept = _SHORTEST_PREFIX - 1, None, False
        lines = [(tokens, line, True) for tokens, line in self._kept]
        lines += [(job.tokens, job.line, False) for job in self._active if job.line is not None]
        for tokens, line, own in lines:
            common = min(_common(tokens, prompt), len(prompt) - 1)  # the last one's logits are needed
            if not line.can_cut and common < len(tokens):
                continue
            if common > best:
                best, source, kept = common, line, own
        if source is None:
            return 0, self._model.line()
        if kept and best >= len(source) // 2:
            self._kept = deque((tokens, line) for tokens, line in self._kept if line is not source)
        else:
            source = source.copy()
        if best < len(source):
            source.cut(best)
        return best, source

    def _step(self) -> None:
        """One pass: a token of each text in writing, and parts of prompts."""
        for job in [job for job in self._active if job.cancelled]:
            self._finish(job, "cancelled")
        room, parts = self._batch, []
        for job in sorted(self._active, key=lambda job: len(job.pending)):  # texts in writing first
            count = min(len(job.pending), room)
            if count:
                parts.append((job, count))
                room -= count
        if not parts:
            return
        started = time.perf_counter()
        requests = []
        for job, count in parts:
            assert job.line is not None  # of every text in work
            requests.append((job.line.number, job.pending[:count], job.echo and not job.made))
        logits = self._model.engine.forward(requests)
        row = 0
        for (job, count), (_, _, every) in zip(parts, requests, strict=True):
            rows = logits[row : row + (count if every else 1)]
            row += len(rows)
            read = job.pending[:count]
            job.tokens += read
            del job.pending[:count]
            if every:
                self._echo(job, read, rows)
            if not job.pending:
                self._write(job, rows[-1])
        self._observe(len(parts), sum(count for _, count in parts), time.perf_counter() - started)

    def _echo(self, job: Job, read: Sequence[int], rows: Array) -> None:
        """Tell the prompt's tokens; a row says of the token behind it."""
        if len(job.tokens) == len(read):
            job.told(Written(read[0]))
        following = [*read[1:], *job.pending[:1]]
        for number, logits in zip(following, rows, strict=False):
            job.told(Written(number, *_log_probabilities(logits, number, job.top or 0)))

    def _write(self, job: Job, logits: Array) -> None:
        """Choose a token, and end the text or go on from it."""
        if job.most == 0:
            self._finish(job, "length")
            return
        token = draw(job.sampling.distribution(logits, job.prompt, job.made), job.rng)
        told = Written(token) if job.top is None else Written(token, *_log_probabilities(logits, token, job.top))
        job.made.append(token)
        context = self._model.engine.context
        if token in job.stops:
            self._finish(job, "stop")
            return
        full = context and len(job.prompt) + len(job.made) >= context
        if len(job.made) >= job.most or full:
            self._finish(job, "length", told)
            return
        job.pending = [token]
        job.told(told)

    def _finish(self, job: Job, reason: str, last: Written = Written(None), *, keep: bool = True) -> None:
        with self._changed:
            self._active.remove(job)
            if keep and job.line is not None and len(job.tokens) >= _SHORTEST_PREFIX:
                self._kept.append((job.tokens, job.line))
                while len(self._kept) > _KEPT_LINES:
                    self._kept.popleft()
        job.line = None
        self._seconds_a_text += 0.2 * (time.monotonic() - job.began - self._seconds_a_text)
        job.told(Written(last.token, last.logprob, last.top, reason))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def _log_probabilities(logits: Array, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's log-probability, and those of the likeliest ids, best first."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argpartition(-exact, min(top, len(exact) - 1))[:top] if top else np.array([], int)
    order = best[np.argsort(-exact[best], kind="stable")]
    return float(exact[token]), tuple((int(number), float(exact[number])) for number in order)
