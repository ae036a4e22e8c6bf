"""Servers to test against, on loopback: ours, stand-ins written from other servers' public schemas, a faulty proxy."""

import asyncio
import base64
import contextlib
import random
import socket
import struct
import threading
import time

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from limbeck.config import Recipe
from limbeck.teachers.server.app import create_app
from limbeck.teachers.server.load import load_served


@contextlib.contextmanager
def running(app, held=None):
    """Serve an ASGI app on a free port; gives the URL."""
    settings = uvicorn.Config(app, log_level="error", access_log=False)
    with serving(settings, held) as (host, port):
        yield f"http://{host}:{port}"


def bound():
    """A socket on a free port, which nobody else gets while it is open."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found


@contextlib.contextmanager
def serving(settings, held=None):
    """Run uvicorn with these settings on a free port, or on the one that `held` keeps; gives host and port."""
    own = held.dup() if held is not None else bound()
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield own.getsockname()
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        own.close()


def limbeck_app(model, key=None, **limits):
    """Our server over a model folder, in float32."""
    recipe = Recipe.model_validate({"teacher": {"model": str(model), "dtype": "float32"}, "teacher_server": limits})
    return create_app(
        load_served(recipe.teacher, recipe.teacher_server), recipe.teacher_server, key, max_batch_tokens=8192
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Served:
    """A causal LM as the stand-ins use it: log-probabilities of one sequence."""

    def __init__(self, model):
        self.model = model.eval()

    @torch.no_grad()
    def logits(self, ids):
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def prompt_logprobs(self, ids, k):
        """For each token but the first: the top k of its distribution as (id, log-prob, rank), and always itself."""
        logprobs = self.logits(ids).log_softmax(-1)
        found = []
        for position in range(1, len(ids)):
            row = logprobs[position - 1]
            values, top = row.topk(k)
            entries = [(int(i), float(v), rank + 1) for rank, (i, v) in enumerate(zip(top, values, strict=True))]
            real = ids[position]
            if all(i != real for i, _, _ in entries):
                entries.append((real, float(row[real]), int((row > row[real]).sum()) + 1))
            found.append(entries)
        return found


def bad_request(message):
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)


def vllm_app(model, max_logprobs=20, name="stand-in"):
    """vLLM: prompt_logprobs in another order than by rank, k or k+1 of them, whatever the temperature."""
    app, served = FastAPI(), model if isinstance(model, Served) else Served(model)

    @app.get("/health")
    def health():
        return None

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        if "prompt" not in body or body.get("model") != name:
            return JSONResponse({"error": {"message": f"The model `{body.get('model')}` does not exist."}}, 404)
        k = body.get("prompt_logprobs")
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if k is not None and max_logprobs != -1 and k > max_logprobs:
            return bad_request(f"Requested prompt logprobs of {k}, which is greater than max allowed: {max_logprobs}")
        choices = []
        for index, ids in enumerate(prompts):
            positions = [None]
            for entries in served.prompt_logprobs(ids, k):
                entries = entries[-1:] + entries[:-1]
                positions.append({str(i): {"logprob": v, "rank": r, "decoded_token": f"<{i}>"} for i, v, r in entries})
            choices.append({"index": index, "text": "x", "logprobs": None, "finish_reason": "length",
                            "prompt_logprobs": positions})  # fmt: skip
        return {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": choices[::-1]}

    return app


def sglang_app(model):
    """SGLang's `/generate`: [logprob, token_id, text] lists, null first."""
    app, served = FastAPI(), Served(model)

    @app.get("/get_model_info")
    def info():
        return {"model_path": "models/stand-in", "is_generation": True}

    @app.post("/generate")
    async def generate(request: Request):
        body = await request.json()
        batch = body["input_ids"] if isinstance(body["input_ids"][0], list) else [body["input_ids"]]
        replies = []
        for ids in batch:
            tops = [None]
            for entries in served.prompt_logprobs(ids, body["top_logprobs_num"]):
                tops.append([[v, i, None] for i, v, _ in entries[: body["top_logprobs_num"]]])
            meta = {"input_top_logprobs": tops, "input_token_logprobs": [[None, ids[0], None]],
                    "prompt_tokens": len(ids), "completion_tokens": 0}  # fmt: skip
            replies.append({"text": "", "meta_info": meta})
        return replies if isinstance(body["input_ids"][0], list) else replies[0]

    return app


def trl_app(model):
    """TRL's `/get_sequence_logprobs/` in binary form."""
    app, served = FastAPI(), Served(model)

    @app.get("/health/")
    def health():
        return {"status": "ok"}

    @app.post("/get_sequence_logprobs/")
    async def sequence_logprobs(request: Request):
        body = await request.json()
        assert body["response_format"] == "binary"
        k, lengths, rows = body["top_logprobs"], [], []
        for ids, prompt in zip(body["sequences"], body["prompt_lengths"], strict=True):
            rows.append(served.prompt_logprobs(ids, k)[prompt - 1 :])
            lengths.append(len(ids) - prompt)
        shape = [len(rows), max(lengths), k]
        logprobs, tokens = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            for t, entries in enumerate(row):
                for j, (token, value, _) in enumerate(entries[:k]):
                    logprobs[i, t, j], tokens[i, t, j] = value, token
        return {"logprobs_b64": base64.b64encode(logprobs.tobytes()).decode(),
                "token_ids_b64": base64.b64encode(tokens.tobytes()).decode(),
                "shape": shape, "completion_lengths": lengths}  # fmt: skip

    return app


def user_app(model):
    """Whole logits, at the bare address."""
    app, served = FastAPI(), Served(model)

    @app.post("/")
    async def logits(request: Request):
        body = await request.json()
        if not body.get("return_logits"):
            return bad_request("return_logits is needed")
        return {"logits": [served.logits(ids).tolist() for ids in body["input_ids"]]}

    return app


class FaultyProxy:
    """A TCP proxy in front of a server that spoils a share of the replies.

    Args:
        upstream: port of the server.
        every: so many replies, one is dropped, delayed, cut, altered or replaced by an error, in turn.
    """

    def __init__(self, upstream, every=5, spares=("/health", "/v1/teacher")):
        self.upstream, self.every, self.spares = upstream, every, spares
        self.random = random.Random(0)
        self.spoilt, self.served = {"alter": 0, "cut": 0, "delay": 0, "drop": 0, "error": 0}, 0

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        start = asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result()
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=5)

    async def _handle(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n")
                           if line.lower().startswith(b"content-length")), 0)  # fmt: skip
            body = await reader.readexactly(length)
            path = head.split(b" ")[1].decode()
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection")]
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            up_writer.write(lines[0] + b"\r\nConnection: close\r\n" + b"\r\n".join(lines[1:]) + body)
            reply = await up_reader.read(-1)
            up_writer.close()
            self.served += path not in self.spares
            if path not in self.spares and self.served % self.every == 0:
                fault = sorted(self.spoilt)[self.served // self.every % len(self.spoilt)]
                self.spoilt[fault] += 1
                reply = await self._spoil(fault, reply, writer)
            writer.write(reply)
            await writer.drain()
        writer.close()

    async def _spoil(self, fault, reply, writer):
        border = reply.index(b"\r\n\r\n") + 4
        if fault == "drop":  # a reset, as a killed process leaves it
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        if fault == "delay":
            await asyncio.sleep(0.3)
            return reply
        if fault == "cut":
            return reply[: border + (len(reply) - border) // 2]
        if fault == "error":
            return b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        spoilt = bytearray(reply)
        for _ in range(3):
            spoilt[self.random.randrange(border, len(reply))] ^= 0x55
        return bytes(spoilt)
