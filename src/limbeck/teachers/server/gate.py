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

from limbeck.console import printable, say, warn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


_ALL_BODIES = 256 << 20  # bytes of bodies in memory
_PART = 256 << 10  # bytes of a reply that are handed over at once, so that a stalled reader holds no more
#: What an answer that is made as it is sent holds in memory; for this layer, never for the caller.
HELD_HEADER = "limbeck-held-bytes"
_LOGGED = 200  # characters of a caller's own words in the log
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
        max_replies: bytes of replies on their way at once; more are sent away with 503 and Retry-After.
        max_active: requests inside at once; more are sent away likewise.
        body_seconds: a body must have arrived by then.
        observe: called with path, status and seconds of each request.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        max_body: int,
        max_replies: int = 1 << 30,
        max_active: int = 256,
        body_seconds: float = 60.0,
        observe: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        self._app, self._observe = app, observe
        self._key = api_key.encode() if api_key else None
        self._max_body, self._max_active, self._body_seconds = max_body, max_active, body_seconds
        self._max_replies = max_replies
        self._active = self._held = self._sending = 0
        self._logged = 0.0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, reply, refused = time.perf_counter(), 0, 0, False

        async def watched(message: Message) -> None:
            nonlocal status, reply, refused
            if refused:  # what the application goes on to say is dropped
                return
            if message["type"] == "http.response.start":
                status, size = message["status"], _reply_size(message)
                if self._sending + size > self._max_replies:
                    status, refused = 503, True
                    await _send_error(send, 503, "too many replies are being read; try again", "busy", _RETRY)
                    return
                reply += size
                self._sending += size
                await send(message)
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            for place in range(0, max(len(body), 1), _PART):
                last = place + _PART >= len(body)
                await send({**message, "body": body[place : place + _PART], "more_body": more or not last})

        self._active += 1
        try:
            await self._enter(scope, receive, watched)
        except _LeftError:
            status = 499
        except _TooLargeError:
            await _send_error(watched, 413, f"the body exceeds {self._max_body} bytes", "too_large")
        except TimeoutError:
            await _send_error(watched, 408, f"the body took longer than {self._body_seconds:g} s", "too_slow")
        except asyncio.CancelledError:
            if status == 0:
                await _send_error(watched, 503, "the server is stopping", "stopping", _RETRY)
        except Exception as error:  # its trace is for the log, never for the caller
            what = printable(f"{scope['method']} {scope['path']}", _LOGGED)
            warn(f"{what} failed: {type(error).__name__}: {printable(str(error), _LOGGED)}")
            if status == 0:
                await _send_error(watched, 500, "the server failed; its log says why", "internal")
        finally:
            self._active -= 1
            self._sending -= reply
            if status >= 400:
                self._log(scope, status)
            self._observe(scope["path"], status, time.perf_counter() - started)

    def _log(self, scope: Message, status: int) -> None:
        """Say who was refused, a few times a second at most."""
        if time.monotonic() - self._logged > 0.2:
            self._logged = time.monotonic()
            host = (scope.get("client") or ("?",))[0]
            say(printable(f"{host} {scope['method']} {scope['path']}", _LOGGED) + f": status {status}")

    async def _enter(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # Two lengths of one body: whoever stands between may have read another request here than we would.
            await _send_error(send, 400, "Content-Length and Transfer-Encoding exclude each other", "invalid_request",
                          [(b"connection", b"close")])  # fmt: skip
            return
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                await _send_error(send, 401, "a key is needed: Authorization: Bearer KEY", "unauthorized",
                              [(b"www-authenticate", b"Bearer")])  # fmt: skip
                return
        if self._active > self._max_active and scope["path"] != "/health":
            await _send_error(send, 503, f"{self._max_active} requests are being served; try again", "busy", _RETRY)
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
            await _send_error(send, 503, "too many bodies are being read; try again", "busy", _RETRY)
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


def _reply_size(message: Message) -> int:
    """Bytes that an answer holds until it is read; the header that told so is taken out."""
    headers = dict(message["headers"])
    told = headers.pop(HELD_HEADER.encode(), headers.get(b"content-length", b"0"))
    message["headers"] = [(name, value) for name, value in message["headers"] if name != HELD_HEADER.encode()]
    return int(told)


async def _next(held: list[Message], receive: Receive) -> Message:
    return held.pop() if held else await receive()


async def _send_error(
    send: Send, status: int, message: str, kind: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps({"error": {"message": message, "type": kind}}).encode()
    content = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*content, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
