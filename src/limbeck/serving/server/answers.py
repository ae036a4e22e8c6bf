"""Answers in OpenAI's form: whole ones, streamed ones, and log-probabilities in both of its ways."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.serving.scheduler import Written
from limbeck.serving.server.jobs import Run
from limbeck.serving.server.texts import Piece
from limbeck.serving.tokenizer import GgufTokenizer

_DONE = b"data: [DONE]\n\n"


@dataclass
class Form:
    """What answers of one endpoint look like.

    Attributes:
        model: its name in the answer.
        tokenizer: for log-probabilities.
        chat: of `/v1/chat/completions`; else of `/v1/completions`.
        logprobs: log-probabilities are asked for.
        prompt_tokens: of all texts.
        made: tokens that were written, counted as they come.
    """

    model: str
    tokenizer: GgufTokenizer
    chat: bool
    logprobs: bool
    prompt_tokens: int
    made: int = 0
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        """Tokens that were read and written."""
        total = self.prompt_tokens + self.made
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.made, "total_tokens": total}

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """An answer around choices."""
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.chat else "text_completion"
        mark = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{mark}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def token_text(self, token: int) -> str:
        """A token alone as text."""
        return self.tokenizer.decode([token]) or self.tokenizer.tokens[token]

    def chat_logprob(self, written: Written) -> dict[str, Any]:
        """One token's entry in a chat's `logprobs.content`."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        assert written.token is not None
        assert written.logprob is not None
        top = [entry(token, logprob) for token, logprob in written.top]
        return {**entry(written.token, written.logprob), "top_logprobs": top}

    def text_logprobs(self, every: Sequence[Written], start: int) -> dict[str, Any]:
        """A completion's `logprobs`; `start` is the offset of its first token in the text."""
        tokens = [self.token_text(written.token) for written in every if written.token is not None]
        offsets = [start + sum(map(len, tokens[:place])) for place in range(len(tokens))]
        top = [
            None if written.logprob is None else {self.token_text(token): logprob for token, logprob in written.top}
            for written in every
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [written.logprob for written in every],
            "top_logprobs": top,
            "text_offset": offsets,
        }


async def whole(form: Form, run: Run) -> dict[str, Any]:
    """The answer once every text has ended.

    Args:
        form: of the endpoint.
        run: the texts.
    """
    texts = ["" for _ in run.jobs]
    tokens: list[list[Written]] = [[] for _ in run.jobs]
    reasons: list[str] = ["" for _ in run.jobs]
    async for number, piece in run.pieces():
        texts[number] += piece.text
        if piece.written is not None:
            tokens[number].append(piece.written)
        reasons[number] = piece.reason or ""
    choices = []
    for number, text in enumerate(texts):
        form.made += len(run.jobs[number].made)
        choice: dict[str, Any] = {"index": number, "finish_reason": reasons[number], "logprobs": None}
        if form.chat:
            choice["message"] = {"role": "assistant", "content": text}
            if form.logprobs:
                content = [form.chat_logprob(written) for written in tokens[number] if written.logprob is not None]
                choice["logprobs"] = {"content": content, "refusal": None}
        else:
            choice["text"] = text
            if form.logprobs:
                choice["logprobs"] = form.text_logprobs(tokens[number], 0)
        choices.append(choice)
    return {**form.envelope(choices, streamed=False), "usage": form.usage()}


async def streamed(form: Form, run: Run, include_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    lengths = [0 for _ in run.jobs]
    if form.chat:
        for number in range(len(run.jobs)):
            delta = {"role": "assistant", "content": ""}
            yield _event(form.envelope([{"index": number, "delta": delta, "finish_reason": None}], streamed=True))
    async for number, piece in run.pieces():
        if piece.reason is not None:
            form.made += len(run.jobs[number].made)
        choice = _choice_of(form, number, piece, lengths)
        if choice is not None:
            yield _event(form.envelope([choice], streamed=True))
        if piece.reason is not None:
            end: dict[str, Any] = {"index": number, "finish_reason": piece.reason}
            end["delta" if form.chat else "text"] = {} if form.chat else ""
            yield _event(form.envelope([end], streamed=True))
    if include_usage:
        yield _event({**form.envelope([], streamed=True), "usage": form.usage()})
    yield _DONE


def _choice_of(form: Form, number: int, piece: Piece, lengths: list[int]) -> dict[str, Any] | None:
    """One token's choice; None where it adds nothing yet."""
    logprobs = None
    if form.logprobs and piece.written is not None and (piece.written.logprob is not None or not form.chat):
        if form.chat:
            logprobs = {"content": [form.chat_logprob(piece.written)], "refusal": None}
        else:
            logprobs = form.text_logprobs([piece.written], lengths[number])
    lengths[number] += len(piece.text)
    if not piece.text and logprobs is None:
        return None
    choice: dict[str, Any] = {"index": number, "finish_reason": None, "logprobs": logprobs}
    return choice | ({"delta": {"content": piece.text}} if form.chat else {"text": piece.text})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
