"""What every request passes first: the key, the body's size and time, and how many are inside.

The one idea: as a plain ASGI layer it acts before a byte of the body is parsed, so that neither a stranger nor a
body of gigabytes costs more than a header.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from limbeck.console import say, warn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


_ALL_BODIES = 256 << 20  # bytes of bodies in memory
_RETRY = [(b"retry-after", b"1")]


class _TooLargeError(Exception):
    """One body is too large."""


class _FullError(Exception):
    """All bodies together are."""


class _LeftError(Exception):
    """The caller left before the body had come."""


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        api_key: wanted as `Authorization: Bearer KEY`; None lets everybody in. `/health` is open.
        max_body: bytes of a request's body.
        max_active: requests inside at once; more are sent away with 503 and Retry-After.
        body_seconds: a body must have arrived by then.
        observe: called with path, status and seconds of each request.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        max_body: int,
        max_active: int = 256,
        body_seconds: float = 60.0,
        observe: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        self._app, self._observe = app, observe
        self._key = api_key.encode() if api_key else None
        self._max_body, self._max_active, self._body_seconds = max_body, max_active, body_seconds
        self._active = self._held = 0
        self._logged = 0.0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._active += 1
        try:
            await self._enter(scope, receive, watched)
        except _LeftError:
            status = 499
        except _TooLargeError:
            await _answer(watched, 413, f"the body exceeds {self._max_body} bytes", "too_large")
        except TimeoutError:
            await _answer(watched, 408, f"the body took longer than {self._body_seconds:g} s", "too_slow")
        except asyncio.CancelledError:
            if status == 0:
                await _answer(watched, 503, "the server is stopping", "stopping", _RETRY)
        except Exception as error:  # its trace is for the log, never for the caller
            warn(f"{scope['method']} {scope['path']} failed: {type(error).__name__}: {error}")
            if status == 0:
                await _answer(watched, 500, "the server failed; its log says why", "internal")
        finally:
            self._active -= 1
            if status >= 400:
                self._log(scope, status)
            self._observe(scope["path"], status, time.perf_counter() - started)

    def _log(self, scope: Message, status: int) -> None:
        """Say who was refused, a few times a second at most."""
        if time.monotonic() - self._logged > 0.2:
            self._logged = time.monotonic()
            host = (scope.get("client") or ("?",))[0]
            say(f"{host} {scope['method']} {scope['path']}: status {status}")

    async def _enter(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                await _answer(send, 401, "a key is needed: Authorization: Bearer KEY", "unauthorized",
                              [(b"www-authenticate", b"Bearer")])  # fmt: skip
                return
        if self._active > self._max_active and scope["path"] != "/health":
            await _answer(send, 503, f"{self._max_active} requests are being served; try again", "busy", _RETRY)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise _TooLargeError
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._body_seconds):
                await self._read(receive, parts)
            held: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
            # Once the body is handed over, only the end of the connection is awaited.
            await self._app(scope, lambda: _next(held, receive), send)
        except _FullError:
            await _answer(send, 503, "too many bodies are being read; try again", "busy", _RETRY)
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, receive: Receive, parts: list[bytes]) -> None:
        """The whole body; what all callers' bodies hold together is bounded too."""
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            body = message.get("body", b"")
            size += len(body)
            self._held += len(body)
            parts.append(body)
            more = message.get("more_body", False)
            if size > self._max_body:
                raise _TooLargeError
            if self._held > max(_ALL_BODIES, self._max_body):
                raise _FullError


async def _next(held: list[Message], receive: Receive) -> Message:
    return held.pop() if held else await receive()


async def _answer(
    send: Send, status: int, message: str, kind: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps({"error": {"message": message, "type": kind}}).encode()
    content = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*content, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
