"""The HTTP side: requests checked against the model's limits, queued, and answered in each protocol's form."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from limbeck.config import SamplingConfig
from limbeck.config.recipe import TeacherServerConfig
from limbeck.data.dataset import PackedRows
from limbeck.errors import LimbeckError
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.wire import MEDIA_TYPE, VERSION, encode_targets, largest_reply, request_hash
from limbeck.teachers.bodies import zstd
from limbeck.teachers.server import engine as engines
from limbeck.teachers.server import schema
from limbeck.teachers.server.gate import HELD_HEADER, Gate
from limbeck.teachers.server.load import Served
from limbeck.teachers.server.metrics import CONTENT_TYPE, ServerMetrics
from limbeck.teachers.server.topk import topk_answer

_BYTES_A_LOGIT, _BYTES_AN_ENTRY = 14, 30  # of JSON, at most
_CODERS = 4  # answers put into bytes at once: each holds a copy of its own
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": schema.ErrorAnswer, "description": text}
    for code, text in {
        400: "The body is no JSON",
        401: "The key is missing or wrong",
        408: "The body came too slowly",
        413: "The body is too large",
        422: "A value lies outside the limits",
        499: "The caller left",
        500: "The server failed",
        503: "Too much is waiting; Retry-After says when to come back",
    }.items()
}


class NotANumber(Exception):  # noqa: N818 (an answer, not a failure)
    """The model's logits are NaN."""


class RefusedRequest(Exception):  # noqa: N818 (an answer, not a failure)
    """A request outside the limits, with the reason for the caller."""


def create_app(served: Served, config: TeacherServerConfig, api_key: str | None, *, max_batch_tokens: int) -> Any:
    """The ASGI application around a loaded teacher.

    Args:
        served: the model.
        config: limits.
        api_key: wanted of callers; None: none.
        max_batch_tokens: tokens in one pass of the engine.
    """
    metrics = ServerMetrics()
    engine = engines.Engine(served.teacher, max_batch_tokens, config.max_queue_tokens, metrics.a_pass)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="limbeck teacher", version="1", description="Targets of a language model for distillation.",
        docs_url=None, redoc_url=None, strict_content_type=False, lifespan=lifespan, responses=_RESPONSES,
    )  # fmt: skip
    app.state.engine = engine
    _add_errors(app)
    _add_information(app, served, config, engine, metrics)
    coders = asyncio.Semaphore(_CODERS)
    _add_targets(app, served, config, engine, coders)
    _add_others(app, served, config, engine, coders)
    max_body = int(config.max_body_mb * 1e6)
    max_replies = int(max(config.max_replies_mb, config.max_reply_mb) * 1e6)
    return Gate(app, api_key=api_key, max_body=max_body, max_replies=max_replies, observe=metrics.request)


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        broken = first["type"] == "json_invalid"
        return answer(400 if broken else 422, f"{where}: {first['msg']}"[:300], "invalid_request")

    @app.exception_handler(RefusedRequest)
    async def refused(request: Request, error: RefusedRequest) -> JSONResponse:
        return answer(422, str(error), "invalid_request")

    @app.exception_handler(LimbeckError)
    async def impossible(request: Request, error: LimbeckError) -> JSONResponse:
        return answer(422, str(error), "invalid_request")

    @app.exception_handler(NotANumber)
    async def broken(request: Request, error: NotANumber) -> JSONResponse:
        return answer(500, "the model's logits are NaN; serve it with --dtype bfloat16 or float32", "not_a_number")

    @app.exception_handler(engines.BusyError)
    async def busy(request: Request, error: engines.BusyError) -> JSONResponse:
        return answer(503, str(error), "busy", {"retry-after": str(error.retry_after)})

    @app.exception_handler(torch.OutOfMemoryError)
    async def memory(request: Request, error: torch.OutOfMemoryError) -> JSONResponse:
        message = "the device has too little memory for this pass; send fewer tokens, or lower --max-batch-tokens"
        return answer(503, message, "out_of_memory", {"retry-after": "5"})

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), "http", dict(error.headers or {}))


def _add_information(
    app: FastAPI, served: Served, config: TeacherServerConfig, engine: engines.Engine, metrics: ServerMetrics
) -> None:
    limits = schema.Limits(
        top_k=min(config.max_top_k, served.teacher.vocab_size),
        sequences=config.max_sequences,
        tokens=config.max_tokens,
        length=served.max_length,
        body_bytes=int(config.max_body_mb * 1e6),
        reply_bytes=int(config.max_reply_mb * 1e6),
    )

    @app.get("/health")
    async def health() -> schema.HealthAnswer:
        """Alive; open to all."""
        return schema.HealthAnswer(waiting_tokens=engine.waiting_tokens)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.text(engine.waiting_tokens), media_type=CONTENT_TYPE)

    @app.get("/v1/teacher")
    async def teacher() -> schema.TeacherAnswer:
        """The model and the limits."""
        return schema.TeacherAnswer(
            version=VERSION, model=served.name, fingerprint=served.fingerprint, tokenizer=served.tokenizer,
            vocab_size=served.teacher.vocab_size, attention=list(served.attention), limits=limits,
        )  # fmt: skip


def _add_targets(
    app: FastAPI, served: Served, config: TeacherServerConfig, engine: engines.Engine, coders: asyncio.Semaphore
) -> None:
    vocab = served.teacher.vocab_size

    @app.post("/v1/targets", response_class=Response, responses={200: {"content": {MEDIA_TYPE: _BINARY}}})
    async def targets(body: schema.TargetsRequest, request: Request) -> Response:
        """Top-k (or head and sampled tail) targets of rows, in the binary format."""
        rows = _request_rows(body.input_ids, served, config, body.documents, body.row_ids)
        support = body.top_k + body.sampled_tail
        if not 1 <= support <= min(config.max_top_k, vocab):
            raise RefusedRequest(
                f"top_k + sampled_tail is {support}; this server gives 1 to {min(config.max_top_k, vocab)} ids"
            )
        if 1.0 not in body.temperatures or len(set(body.temperatures)) < len(body.temperatures):
            raise RefusedRequest(f"temperatures are {body.temperatures}; they must be different and include 1")
        size = largest_reply(1, support, vocab, len(body.temperatures))
        _refuse_large(rows, size, config, f"{support} ids")
        sampling = None
        if body.sampled_tail:
            sampling = SamplingConfig(head=body.top_k, draws=body.sampled_tail, seed=body.seed)
        drawn_at = (body.sampling_temperature or max(body.temperatures)) if sampling else None
        if drawn_at is not None and drawn_at not in body.temperatures:
            raise RefusedRequest(f"sampling_temperature {drawn_at} is not among the temperatures {body.temperatures}")
        wanted = engines.Request(
            top_k=body.top_k or None,
            temperatures=tuple(body.temperatures),
            attention=_attention(body.documents, served),
            sampling=sampling,
            sampling_temperature=drawn_at,
            alone=body.reproducible or sampling is not None,
        )
        found: SparseTargets = await _wait(engine.submit(rows, wanted), request)
        full, packed = body.logprobs == "float32", "zstd" in request.headers.get("accept-encoding", "")
        lengths = [len(ids) for ids in body.input_ids]
        async with coders:
            asked = request_hash(await request.body())
            content = await asyncio.to_thread(_encoded, found, lengths, full, packed, served.fingerprint, asked)
        headers = {"vary": "accept-encoding", **({"content-encoding": "zstd"} if packed else {})}
        return Response(content, media_type=MEDIA_TYPE, headers=headers)


def _encoded(found: SparseTargets, lengths: list[int], full: bool, packed: bool, fingerprint: str, asked: str) -> bytes:
    """The wire form; places that fill up shorter sequences have no support."""
    ids = found.token_ids
    if min(lengths) < ids.shape[1]:
        beyond = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]
        tensors = {**found.tensors(), "token_ids": ids.masked_fill(beyond.unsqueeze(-1), -1)}
        tensors["logprobs"] = found.logprobs.masked_fill(beyond.unsqueeze(-1), -torch.inf)
        found = found.with_tensors(tensors)
    data = encode_targets(found, full=full, fingerprint=fingerprint, request=asked)
    return zstd.compress(data, 1) if packed else data


def _add_others(
    app: FastAPI, served: Served, config: TeacherServerConfig, engine: engines.Engine, coders: asyncio.Semaphore
) -> None:
    vocab = served.teacher.vocab_size

    @app.post("/v1/topk", response_model=schema.TopKAnswer)
    async def topk(body: schema.TopKRequest, request: Request) -> Response:
        """Top-k logits, quantised, as JSON."""
        rows = _request_rows(body.input_ids, served, config)
        if body.topk > min(config.max_top_k, vocab):
            raise RefusedRequest(f"topk is {body.topk}; this server gives at most {min(config.max_top_k, vocab)} ids")
        _refuse_large(rows, _BYTES_AN_ENTRY * body.topk, config, f"{body.topk} ids")
        temperatures = tuple(sorted({1.0, body.temperature}))
        wanted = engines.Request(top_k=body.topk, temperatures=temperatures, attention=_attention(None, served))
        found: SparseTargets = await _wait(engine.submit(rows, wanted), request)
        lengths = [len(ids) for ids in body.input_ids]
        async with coders:
            answer = await asyncio.to_thread(topk_answer, found, lengths, body.temperature, body.return_dtype)
        return Response(answer, media_type="application/json")

    @app.post("/v1/completions", response_model=schema.LogitsAnswer)
    async def completions(body: schema.LogitsRequest, request: Request) -> StreamingResponse:
        """Whole logits as JSON: exact, and large."""
        rows = _request_rows(body.input_ids, served, config)
        _refuse_large(rows, _BYTES_A_LOGIT * vocab, config, f"{vocab} logits")
        wanted = engines.Request(attention=_attention(None, served), logits=True, alone=True)
        logits: torch.Tensor = await _wait(engine.submit(rows, wanted), request)
        lengths = [len(ids) for ids in body.input_ids]
        held = {HELD_HEADER: str(logits.numel() * logits.element_size())}
        return StreamingResponse(_logits_json(logits, lengths), media_type="application/json", headers=held)


def _refuse_large(rows: PackedRows, bytes_a_position: int, config: TeacherServerConfig, what: str) -> None:
    positions, most = rows.input_ids.numel(), int(config.max_reply_mb * 1e6) // bytes_a_position
    if positions > most:
        raise RefusedRequest(
            f"{positions} positions (filled up to the longest) of {what}; this server gives {most} positions at once"
        )


def _logits_json(logits: torch.Tensor, lengths: list[int]) -> Iterator[str]:
    """`{"logits": …}`, a position at a time; nine digits are exactly a float32."""
    yield '{"logits": ['
    for row, length in enumerate(lengths):
        yield "[" if row == 0 else ", ["
        for position in range(length):
            held = logits[row, position].clamp_min(-1e30)  # JSON has no infinity
            values = ",".join(map("%.9g".__mod__, held.tolist()))
            yield f"{', ' if position else ''}[{values}]"
        yield "]"
    yield "]}"


def _attention(documents: Any, served: Served) -> str:
    """Rows that are one document each need no block-causal mask."""
    return "packed" if documents is None or "per_document" not in served.attention else "per_document"


def _request_rows(
    sequences: list[list[int]],
    served: Served,
    config: TeacherServerConfig,
    documents: list[list[int]] | None = None,
    row_ids: list[int] | None = None,
) -> PackedRows:
    """Checked sequences as a batch, filled up to the longest with a document of their own."""
    longest, vocab = max(map(len, sequences)), served.teacher.vocab_size
    if len(sequences) > config.max_sequences:
        raise RefusedRequest(f"{len(sequences)} sequences; this server takes {config.max_sequences} at once")
    if longest > served.max_length:
        raise RefusedRequest(f"a sequence of {longest} tokens; this model takes {served.max_length}")
    if longest * len(sequences) > config.max_tokens:
        raise RefusedRequest(
            f"{longest * len(sequences)} tokens (filled up to the longest); this server takes {config.max_tokens}"
        )
    largest = max(map(max, sequences))
    if largest >= vocab:
        raise RefusedRequest(f"token id {largest}; the vocabulary has {vocab} ids")
    if row_ids is not None and len(row_ids) != len(sequences):
        raise RefusedRequest(f"{len(row_ids)} row_ids for {len(sequences)} sequences")
    docs = [[0] * len(ids) for ids in sequences]
    if documents is not None:
        if "per_document" not in served.attention:
            raise RefusedRequest("this model cannot keep the documents of a row apart; leave documents out")
        if [sum(lengths) for lengths in documents] != [len(ids) for ids in sequences]:
            raise RefusedRequest("documents must give, for each sequence, lengths that sum to its own")
        docs = [[number for number, length in enumerate(row) for _ in range(length)] for row in documents]
    return PackedRows(
        torch.tensor(row_ids if row_ids is not None else [-1] * len(sequences)),
        torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences]),
        torch.tensor([row + [-1] * (longest - len(row)) for row in docs]),
    )


async def _wait(future: Any, request: Request) -> Any:
    """The job's result; a job whose caller has left is taken out of the queue."""
    waited = asyncio.wrap_future(future)
    try:
        while True:
            done, _ = await asyncio.wait({waited}, timeout=0.5)
            if done:
                break
            if await request.is_disconnected():
                raise HTTPException(499, "the caller left")
    except BaseException:  # the caller left, or the server is stopping: nobody waits for this job any more
        future.cancel()
        raise
    found = waited.result()
    numbers = found.logprobs if isinstance(found, SparseTargets) else found
    if bool(torch.isnan(numbers).any()):
        raise NotANumber
    return found
