"""The HTTP side of a served model: requests checked, texts written by the scheduler, answers in OpenAI's form."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from limbeck.config.engine import ServerConfig
from limbeck.errors import LimbeckError
from limbeck.serving.model import GgufModel
from limbeck.serving.scheduler import QueueFullError, Scheduler
from limbeck.serving.server import schema
from limbeck.serving.server.answers import Form, streamed, whole
from limbeck.serving.server.jobs import Run, UnservableRequest, Wanted, new_tokens_for, sampling_of
from limbeck.serving.server.metrics import CONTENT_TYPE, ChatMetrics
from limbeck.serving.server.origin import OriginCheck
from limbeck.serving.server.template import ChatTemplate
from limbeck.teachers.server.gate import Gate

_UNLIMITED = 1 << 20  # new tokens of a model without a longest context, where none are asked for
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": schema.ErrorBody, "description": text}
    for code, text in {
        400: "The request cannot be served as it is",
        401: "The key is missing or wrong",
        403: "The request comes from a page of another origin",
        408: "The body came too slowly",
        413: "The body is too large",
        429: "Too many texts wait; Retry-After says when to come back",
        500: "The server failed",
        503: "The server is stopping, or too many connections are open",
    }.items()
}


@dataclass
class ServedModel:
    """A model with its name, scheduler and template."""

    model: GgufModel
    name: str
    config: ServerConfig
    started: int
    batch_tokens: int

    @cached_property
    def metrics(self) -> ChatMetrics:
        """The server's counters."""
        return ChatMetrics(
            lambda: self.scheduler.waiting, lambda: self.scheduler.active, lambda: self.scheduler.cache_bytes()
        )

    @cached_property
    def scheduler(self) -> Scheduler:
        """Who writes the texts."""
        config = self.config
        told = self.metrics.step
        return Scheduler(self.model, config.max_concurrent, config.max_waiting, self.batch_tokens, told)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Of conversations; None where the file has none."""
        tokenizer = self.model.tokenizer
        if tokenizer.chat_template is None:
            return None
        bos, eos = ("" if number is None else tokenizer.tokens[number] for number in (tokenizer.bos, tokenizer.eos))
        return ChatTemplate(tokenizer.chat_template, bos, eos)

    @property
    def context(self) -> int:
        """The longest text; 0: there is no limit."""
        own, wanted = self.model.engine.context, self.config.ctx_size
        return int(min(own, wanted) if own and wanted else own or wanted)


def create_chat_app(served: ServedModel, api_key: str | None) -> Any:
    """The ASGI application around a model.

    Args:
        served: the model.
        api_key: wanted of callers; None: none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.scheduler.close, served.config.drain_seconds)

    app = FastAPI(
        title="limbeck", version="1", description="A language model on limbeck's CPU engine, with OpenAI's API.",
        redoc_url=None, strict_content_type=False, lifespan=lifespan, responses=_RESPONSES,
    )  # fmt: skip
    _handle_errors(app)
    _add_facts(app, served)
    _add_completions(app, served)
    _add_chat(app, served)
    config = served.config
    gate = Gate(
        app, api_key=api_key, max_body=int(config.max_body_mb * 1e6), max_active=config.max_connections,
        observe=served.metrics.request,
    )  # fmt: skip
    return OriginCheck(gate, config.host, config.allowed_hosts)


def _error(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None, **more: str | None
) -> JSONResponse:
    detail = schema.ErrorDetail(message=message, type=kind, **more)
    return JSONResponse({"error": detail.model_dump()}, status, headers)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where}: {first['msg']}"[:300], "invalid_request_error", param=where[:100] or None)

    @app.exception_handler(UnservableRequest)
    async def refused(request: Request, error: UnservableRequest) -> JSONResponse:
        return _error(400, str(error), "invalid_request_error", param=error.param, code=error.code)

    @app.exception_handler(LimbeckError)
    async def impossible(request: Request, error: LimbeckError) -> JSONResponse:
        return _error(400, str(error), "invalid_request_error")

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return _error(429, str(error), "rate_limit_error", {"retry-after": str(error.retry_after)})

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "invalid_request_error", dict(error.headers or {}))


def _add_facts(app: FastAPI, served: ServedModel) -> None:
    tokenizer = served.model.tokenizer

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Alive; open to all."""
        return {"status": "ok", "active": served.scheduler.active, "waiting": served.scheduler.waiting}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """Counters in Prometheus' format."""
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        entry = {"id": served.name, "object": "model", "created": served.started, "owned_by": "limbeck",
                 "max_model_len": served.context or None}  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        """A language model has no embeddings of texts."""
        message = f"{served.name} is a causal language model; its hidden states are no embeddings of a text"
        return _error(404, message, "invalid_request_error", code="model_not_found")

    @app.post("/tokenize")
    async def tokenize(body: schema.TokenizeBody) -> dict[str, Any]:
        """Ids of a text."""
        return {"tokens": await asyncio.to_thread(tokenizer.encode, body.text, body.add_special)}

    @app.post("/detokenize")
    async def detokenize(body: schema.DetokenizeBody) -> dict[str, Any]:
        """The text of ids."""
        if body.tokens and max(body.tokens) >= tokenizer.size:
            raise UnservableRequest(f"tokens has {max(body.tokens)}, and ids are 0 to {tokenizer.size - 1}", "tokens")
        return {"text": tokenizer.decode(body.tokens)}


def _stops(body: schema.SamplingBody) -> list[str]:
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [stop for stop in given if stop]


async def _write_answer(served: ServedModel, body: schema.SamplingBody, wanted: Sequence[Wanted], form: Form) -> Any:
    """Write the texts; the whole answer, or events as they come."""
    started = time.perf_counter()
    run = Run(served.model, served.scheduler, wanted, _stops(body))
    served.metrics.prompt_tokens.inc(form.prompt_tokens)
    run.first = lambda: served.metrics.first.observe(time.perf_counter() - started)
    run.each = served.metrics.new_tokens.inc
    if body.stream:
        include = body.stream_options is not None and body.stream_options.include_usage
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(streamed(form, run, include), media_type="text/event-stream", headers=headers)
    return await whole(form, run)


def _add_completions(app: FastAPI, served: ServedModel) -> None:
    tokenizer = served.model.tokenizer

    @app.post("/v1/completions")
    async def completions(body: schema.CompletionBody, request: Request) -> Any:
        """Texts that go on from prompts."""
        prompts = await asyncio.to_thread(_prompt_ids, tokenizer, body.prompt)
        if len(prompts) * body.n > served.config.max_texts:
            raise UnservableRequest(
                f"{len(prompts)} prompts with n {body.n} are {len(prompts) * body.n} texts; one request may have "
                f"{served.config.max_texts}", "n",
            )  # fmt: skip
        wanted: list[Wanted] = []
        for ids in prompts:
            most = new_tokens_for(ids, body.max_tokens, served.context, _UNLIMITED)
            for _ in range(body.n):
                sampling = sampling_of(body, len(wanted), tokenizer.size)
                echo = body.echo
                wanted.append(Wanted(ids, most, sampling, body.logprobs, echo))
        form = Form(served.name, tokenizer, False, body.logprobs is not None, sum(map(len, prompts)))
        return await _until_left(request, _write_answer(served, body, wanted, form))


def _prompt_ids(tokenizer: Any, given: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """Ids of every prompt."""
    if isinstance(given, str):
        return [tokenizer.encode(given)]
    if not given:
        raise UnservableRequest("prompt is an empty list", "prompt")
    every = [given] if isinstance(given[0], int) else given
    ids = [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in every]
    wrong = next((number for one in ids for number in one if not 0 <= number < tokenizer.size), None)
    if wrong is not None:
        raise UnservableRequest(f"prompt has the id {wrong}, and ids are 0 to {tokenizer.size - 1}", "prompt")
    return ids


def _add_chat(app: FastAPI, served: ServedModel) -> None:
    tokenizer = served.model.tokenizer

    @app.post("/v1/chat/completions")
    async def chat(body: schema.ChatBody, request: Request) -> Any:
        """The next turn of a conversation."""
        if served.template is None:
            raise UnservableRequest(
                f"{served.name} has no chat template in its file, so it knows no turns; ask /v1/completions.",
                "messages",
            )
        if body.response_format and body.response_format.get("type") != "text":
            raise UnservableRequest("response_format is not text; this server writes text alone", "response_format")
        messages = [_turn_of(message) for message in body.messages]
        text = await asyncio.to_thread(served.template.render, messages, body.tools)
        ids = await asyncio.to_thread(tokenizer.encode, text, False)
        most = new_tokens_for(ids, body.max_completion_tokens or body.max_tokens, served.context, _UNLIMITED)
        top = (body.top_logprobs or 0) if body.logprobs else None
        wanted = [Wanted(ids, most, sampling_of(body, number, tokenizer.size), top) for number in range(body.n)]
        form = Form(served.name, tokenizer, True, body.logprobs, len(ids))
        return await _until_left(request, _write_answer(served, body, wanted, form))


def _turn_of(message: schema.ChatMessage) -> dict[str, Any]:
    """A turn for the template: parts of text are joined."""
    found = message.model_dump()
    if isinstance(message.content, list):
        other = next((part.get("type") for part in message.content if part.get("type") != "text"), None)
        if other is not None:
            raise UnservableRequest(f"a message has a part of type {other!r}; this model reads text", "messages")
        found["content"] = "".join(str(part.get("text", "")) for part in message.content)
    return found


async def _until_left(request: Request, work: Any) -> Any:
    """The answer; when the caller leaves first, the work is given up."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=499)
    finally:
        for one in (task, watcher):
            if not one.done():
                one.cancel()


async def _left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
