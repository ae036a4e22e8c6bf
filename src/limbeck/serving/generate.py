"""Text from a GGUF model: token by token, or with a smaller model that proposes several at once.

Speculative decoding draws proposals d₁ … d_k from the draft's distributions q_i and lets the model read them in one
pass, which costs hardly more than one token: weights are read once. Proposal i is kept with probability
min(1, p_i(d_i) / q_i(d_i)); the first that is not kept is replaced by a draw from max(p_i − q_i, 0), normalised, and if
all are kept one more is drawn from the model. So every token has exactly the model's own distribution.

Source: Leviathan, Kalman & Matias, arXiv 2211.17192.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limbeck.config.engine import EngineConfig
from limbeck.config.recipe import GenerationConfig
from limbeck.errors import ConfigError
from limbeck.serving.model import GgufModel, Line
from limbeck.serving.sampling import Array, Sampling, draw


@dataclass
class Statistics:
    """What a generation did.

    Attributes:
        prompt_tokens, new_tokens: how many.
        prefill_seconds, decode_seconds: reading the prompt, and writing.
        passes: of the model after the prompt's, each of which gave one token or more.
        decoded: tokens of those passes; the prompt's own gave the first where there is no draft.
        proposed, kept: tokens of the draft.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0
    decoded: int = 0
    proposed: int = 0
    kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Rates and, with a draft, the tokens of a pass."""
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": _rate(self.prompt_tokens, self.prefill_seconds),
            "decode_tokens_per_second": _rate(self.decoded, self.decode_seconds),
        }
        if self.proposed:
            found["accepted_share"] = self.kept / self.proposed
            found["tokens_per_pass"] = self.decoded / self.passes
        return found


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 1) if seconds > 0.0 else None


@dataclass
class Generation:
    """One text in the making.

    Args:
        model: the model.
        sampling: how tokens are chosen.
        draft: a smaller model of the same tokenizer.
        draft_tokens: k.

    Raises:
        ConfigError: the draft has other tokens than the model.
    """

    model: GgufModel
    sampling: Sampling
    draft: GgufModel | None = None
    draft_tokens: int = 4
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        if self.draft is not None and self.draft.tokenizer.tokens != self.model.tokenizer.tokens:
            raise ConfigError(
                f"engine.draft {self.draft.path} has {self.draft.tokenizer.size} tokens and {self.model.path} "
                f"{self.model.tokenizer.size}, or others. A draft needs the model's own tokenizer."
            )

    def tokens(self, prompt: Sequence[int], most: int) -> Iterator[int]:
        """Ids that go on from a prompt, until one that ends a text, `most` of them, or the end of the context.

        Raises:
            ConfigError: the prompt is empty, or leaves no room in the context.
        """
        context = self.model.engine.context or len(prompt) + most
        if not prompt:
            raise ConfigError("the prompt has no tokens; give some text to continue.")
        if len(prompt) >= context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens and {self.model.path} a context of {context}; shorten it."
            )
        most = min(most, context - len(prompt))
        rng = np.random.default_rng(self.sampling.seed)
        stops = self.model.tokenizer.stops
        self.statistics.prompt_tokens = len(prompt)
        if self.draft is None or len(prompt) >= (self.draft.engine.context or 1 << 30):
            every = self._plain(prompt, rng)  # a draft that cannot read the prompt proposes nothing
        else:
            every = self._speculative(prompt, rng, self.draft)
        for number in itertools.islice(every, most):
            self.statistics.new_tokens += 1
            if number in stops:
                return
            yield number

    def _plain(self, prompt: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
        line, start = self.model.line(), time.perf_counter()
        logits = line.extend(prompt)
        self.statistics.prefill_seconds = time.perf_counter() - start
        while True:
            start = time.perf_counter()
            number = draw(self.sampling.distribution(logits), rng)
            self.statistics.decode_seconds += time.perf_counter() - start
            yield number
            start = time.perf_counter()
            logits = line.extend([number])
            self.statistics.passes += 1
            self.statistics.decoded += 1
            self.statistics.decode_seconds += time.perf_counter() - start

    def _speculative(self, prompt: Sequence[int], rng: np.random.Generator, draft: GgufModel) -> Iterator[int]:
        """The model has read all but the last token, and so has the draft: each pass begins with that one."""
        rest = _Reader(self.model.line()), _Reader(draft.line())
        last, start = prompt[-1], time.perf_counter()
        if len(prompt) > 1:
            rest[0].line.extend(prompt[:-1])
            rest[1].line.extend(prompt[:-1])
        self.statistics.prefill_seconds = time.perf_counter() - start
        while True:
            start = time.perf_counter()
            found = self._pass(*rest, last, rng)
            self.statistics.decode_seconds += time.perf_counter() - start
            self.statistics.decoded += len(found)
            yield from found
            last = found[-1]

    def _pass(self, model: "_Reader", draft: "_Reader", last: int, rng: np.random.Generator) -> list[int]:
        """The tokens of one pass; the two then have read all of them but the last."""
        room = min(_room(self.model, model.line), _room(self.draft or self.model, draft.line))
        count = max(0, min(self.draft_tokens, room - 1))
        proposed: list[int] = []
        guesses: list[Array] = []
        draft.mark()
        for number in range(count):
            logits = draft.line.extend([last if number == 0 else proposed[-1]])
            guesses.append(self.sampling.distribution(logits))
            proposed.append(draw(guesses[-1], rng))
        model.mark()
        every = model.line.extend([last, *proposed], every=True)
        self.statistics.passes += 1
        self.statistics.proposed += count
        kept = 0
        while kept < count:
            wanted = self.sampling.distribution(every[kept])
            token = proposed[kept]
            if rng.random() * guesses[kept][token] >= wanted[token]:
                break
            kept += 1
        self.statistics.kept += kept
        if kept < count:
            next_one = draw(_left_over(wanted, guesses[kept]), rng)
        else:
            next_one = draw(self.sampling.distribution(every[count]), rng)
        model.keep([last, *proposed], kept + 1)
        if _room(self.draft or self.model, draft.line) > kept + 1:  # one that is full proposes nothing any more
            draft.keep([last, *proposed], kept + 1)
        return [*proposed[:kept], next_one]


def write_text(settings: GenerationConfig, engine: EngineConfig) -> dict[str, Any]:
    """Continue `generation.prompt` with `generation.model`, a GGUF file; the text and how it came about."""
    assert settings.model is not None
    model = GgufModel(settings.model, engine)
    draft = None if engine.draft is None else GgufModel(engine.draft, engine)
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    generation = Generation(model, sampling, draft, engine.draft_tokens)
    prompt = model.tokenizer.encode(settings.prompt)
    ids = list(generation.tokens(prompt, settings.max_new_tokens))
    text = model.tokenizer.decode([*prompt, *ids])
    statistics = generation.statistics.as_dict()
    return {"model": str(settings.model), "prompt": settings.prompt, "text": text, "statistics": statistics}


def _room(model: GgufModel, line: Line) -> int:
    """Tokens that a line can still read."""
    return int(model.engine.context or 1 << 30) - len(line)


def _left_over(wanted: Array, guessed: Array) -> Array:
    """max(p − q, 0), normalised; p itself where nothing is left of it but rounding."""
    rest = np.maximum(wanted - guessed, 0.0)
    total = rest.sum()
    return rest / total if total > 0.0 else wanted


class _Reader:
    """A line that can go back: by cutting it, or, where the model's memory is a recurrence, from a copy."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._start = len(line)
        self._copy: Line | None = None

    def mark(self) -> None:
        """From here on `keep` counts."""
        self._start = len(self.line)
        self._copy = None if self.line.can_cut else self.line.copy()

    def keep(self, ids: Sequence[int], count: int) -> None:
        """Have read exactly the first `count` of the ids since the mark."""
        read = len(self.line) - self._start
        if read > count:
            if self._copy is None:
                self.line.cut(self._start + count)
            else:
                self.line = self._copy
                self.line.extend(ids[:count])
        elif read < count:
            self.line.extend(ids[read:count])
