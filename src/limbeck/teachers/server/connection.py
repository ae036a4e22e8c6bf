"""Connections that cost the server little before and after a request: bounded in number, in waiting and in stalling.

The one idea: uvicorn's own HTTP/1.1 protocol with the bounds it lacks. A request's head must be complete in some
seconds, a reader must take something in some seconds, and beyond a number of connections the one that has waited
longest without asking is closed for the newest, so that the process never runs out of files and `/health` answers.
"""

import asyncio
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_RESERVED_FILES = 64  # for the model, logs and libraries


class Connection(H11Protocol):
    """One client's connection; see `connection_class` for its bounds."""

    max_connections = 512
    head_seconds = 20.0
    stall_seconds = 30.0
    _head_clock: asyncio.TimerHandle | None = None
    _stall_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take the connection; where there are too many, at the expense of one that asks for nothing, or not at all."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not self._drop_another():
            transport.abort()
        else:
            self._watch_head()

    def _drop_another(self) -> bool:
        waiting = [other for other in self.connections if isinstance(other, Connection) and other._head_clock]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda other: other._head_clock.when() if other._head_clock else 0.0)
        oldest._stop_head_clock()
        oldest.transport.abort()
        return True

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for clock in (self._head_clock, self._stall_clock):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The reader is behind."""
        super().pause_writing()
        self._stall_clock = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader has caught up."""
        super().resume_writing()
        if self._stall_clock is not None:
            self._stall_clock.cancel()

    def _watch_head(self) -> None:
        """The clock runs while a request's head is awaited or incomplete; more bytes of it do not turn it back."""
        awaited = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if awaited and self._head_clock is None:
            self._head_clock = self.loop.call_later(self.head_seconds, self.transport.abort)
        elif not awaited:
            self._stop_head_clock()


def connection_class(
    max_connections: int, head_seconds: float = Connection.head_seconds, stall_seconds: float = Connection.stall_seconds
) -> type[Connection]:
    """A connection class with these bounds, the first also held below what the process may open.

    Args:
        max_connections: connections at once.
        head_seconds: a request's head must have come by then.
        stall_seconds: a reader that takes nothing for so long is dropped.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        max_connections = min(max_connections, max(8, files - _RESERVED_FILES))
    bounds = {"max_connections": max_connections, "head_seconds": head_seconds, "stall_seconds": stall_seconds}
    return type("BoundedConnection", (Connection,), bounds)


class OncePerSecond(logging.Filter):
    """Lets a message through once a second: whoever provokes warnings must not fill the disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a message not seen within the last second."""
        now = time.monotonic()
        if now - self._last.get(record.msg, 0.0) < 1.0:
            return False
        if len(self._last) > 100:
            self._last.clear()
        self._last[record.msg] = now
        return True


#: One for the process: a logger takes the same filter once.
once_per_second = OncePerSecond()
