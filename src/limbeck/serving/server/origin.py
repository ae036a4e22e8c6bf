"""Who a request says it is for and from: pages of other sites must not drive a server on one's own machine.

A browser sends any page's requests to 127.0.0.1, but says the page's origin; and a name that an attacker points at
127.0.0.1 shows in Host. Both are checked before anything else.

Source: DNS rebinding (OWASP); the Fetch standard's Origin header.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from limbeck.teachers.server.gate import App, Message, Receive, Send
from limbeck.teachers.server.run import LOOPBACK

_ANY = ("0.0.0.0", "::", "")  # noqa: S104 (compared with, not bound)


class OriginCheck:
    """ASGI middleware.

    Args:
        app: what is behind it.
        host: what the server listens on; on a loopback address only loopback names are answered.
        allowed: further names.
    """

    def __init__(self, app: App, host: str, allowed: Sequence[str]) -> None:
        self._app = app
        names = {*allowed, host, *(LOOPBACK if host in (*LOOPBACK, *_ANY) else ())}
        self._names = {name.lower().strip("[]") for name in names}
        self._any_host = host in _ANY  # it is reached by names that only its network knows

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 403."""
        if scope["type"] == "http":
            headers: dict[bytes, bytes] = dict(scope["headers"])
            host = _name(f"//{headers.get(b'host', b'').decode('latin-1')}")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if not self._any_host and host not in self._names:
                await _forbid(send, f"this server is not {host[:100]!r}; name it with server.allowed_hosts")
                return
            if origin and _name(origin) not in {*self._names, host}:
                await _forbid(send, f"pages of {origin[:100]!r} may not use this server (server.allowed_hosts)")
                return
        await self._app(scope, receive, send)


def _name(url: str) -> str:
    """The host's name of a URL or a Host header; `null` origins have none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


async def _forbid(send: Send, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "forbidden"}}).encode()
    headers: Any = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
