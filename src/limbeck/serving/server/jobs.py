"""From a request to jobs of the scheduler, and their tokens back in the event loop."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.serving.model import GgufModel
from limbeck.serving.sampling import Sampling
from limbeck.serving.scheduler import Job, Scheduler, Written
from limbeck.serving.server.schema import SamplingBody
from limbeck.serving.server.texts import Piece, TextAssembler
from limbeck.serving.tokenizer import Detokenizer


class UnservableRequest(Exception):  # noqa: N818 (an answer, not a failure)
    """A request that cannot be served, with the reason for the caller."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass
class Wanted:
    """One text that a request asks for."""

    prompt: list[int]
    most: int
    sampling: Sampling
    top: int | None = None
    echo: bool = False


class Run:
    """The texts of one request, which end when the caller leaves.

    Args:
        model, scheduler: what writes them.
        wanted: the texts.
        stops: strings that end each.

    Attributes:
        first: called with the first token of all texts.
        each: called with each token.
    """

    def __init__(self, model: GgufModel, scheduler: Scheduler, wanted: Sequence[Wanted], stops: Sequence[str]) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Written]] = asyncio.Queue()
        tokenizer = model.tokenizer
        self._texts = [
            TextAssembler(
                Detokenizer(tokenizer, () if one.echo else one.prompt[-8:]), stops, len(one.prompt) if one.echo else 0
            )
            for one in wanted
        ]
        self.jobs = [
            Job(one.prompt, one.sampling, one.most, tokenizer.stops, self._teller(number), one.top, one.echo)
            for number, one in enumerate(wanted)
        ]
        self.first: Callable[[], object] | None = None
        self.each: Callable[[], object] | None = None
        scheduler.submit(self.jobs)

    def _count(self) -> None:
        if self.first is not None:
            self.first()
            self.first = None
        if self.each is not None:
            self.each()

    def _teller(self, number: int) -> Any:
        def tell(written: Written) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, written))

        return tell

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of the text, and what it gained, until all have ended."""
        open_texts = set(range(len(self._texts)))
        try:
            while open_texts:
                number, written = await self._queue.get()
                if written.token is not None:
                    self._count()
                if number not in open_texts:
                    continue  # what came behind a stop string
                piece = self._texts[number].add(written)
                if piece.reason is not None:
                    open_texts.remove(number)
                    if written.reason is None:
                        self._scheduler.cancel(self.jobs[number])
                yield number, piece
        finally:
            for number in open_texts:
                self._scheduler.cancel(self.jobs[number])


def sampling_of(body: SamplingBody, number: int, vocabulary: int) -> Sampling:
    """How text `number` of a request is sampled.

    Raises:
        UnservableRequest: `logit_bias` names no token.
    """
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= vocabulary:
            raise UnservableRequest(
                f"logit_bias names {key[:20]!r}, and tokens are 0 to {vocabulary - 1}", "logit_bias"
            )
        bias[int(key)] = value
    seed = secrets.randbits(63) if body.seed is None else body.seed + number
    return Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=seed,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
    )


def new_tokens_for(prompt: Sequence[int], asked: int | None, context: int, unlimited: int) -> int:
    """New tokens that a text may have.

    Raises:
        UnservableRequest: prompt and answer do not fit into the context.
    """
    if not prompt:
        raise UnservableRequest("the prompt has no tokens", "prompt")
    context = context or len(prompt) + (unlimited if asked is None else asked)
    if len(prompt) + (asked or 1) > context:
        asks = f" and {asked} new ones are asked for" if asked else ""
        raise UnservableRequest(
            f"the prompt has {len(prompt)} tokens{asks}; the context is {context}. Shorten it, or ask for less.",
            code="context_length_exceeded",
        )
    return context - len(prompt) if asked is None else asked
