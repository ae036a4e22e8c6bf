"""Talking to teachers over HTTP: many requests at once, in an event loop of their own, and what happens when one fails.

The one idea: a failure is either the connection's (refused, reset, cut, altered, late, 5xx, 429), which is tried
again with growing, jittered pauses, or the answer's (4xx, a wrong shape, another model), which no second try mends
and which stops the run at once with the reason.
"""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from limbeck.config.base import default
from limbeck.config.teacher import RemoteTeacherConfig
from limbeck.console import printable, warn
from limbeck.errors import ConfigError, CorruptError, LimbeckError
from limbeck.teachers.bodies import ACCEPTED, BodyReader, DamagedError, TooLargeError, encode_body

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_CONNECT_SECONDS = 10.0  # a host that drops packets is as good as absent
_LATER = (408, 425, 429, 502, 503, 504)  # "come back"; a 500 may be how it refuses a form it does not know
_SHOWN = 300  # characters of a server's own words in an error


class EndpointError(LimbeckError):
    """Something is wrong with an endpoint, not with this machine's files or settings."""


class UnreachableError(EndpointError):
    """No connection to the endpoint when the run starts."""


class UnreadyError(UnreachableError):
    """The endpoint is there and says that it cannot answer yet."""


class RefusedError(EndpointError):
    """The endpoint understood the request and will not answer it."""


class WrongAnswerError(EndpointError):
    """An answer that arrived whole and cannot be used: shape, vocabulary, probabilities, model."""


class LostError(EndpointError):
    """The endpoint went away during the run and did not come back in time."""


class _TransientError(Exception):
    """A failure worth another try; `wait` is what the server asked for."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Any
    content: bytes


@dataclass(frozen=True)
class Query:
    """One request and how its answer is read.

    Attributes:
        path: below the endpoint's URL.
        body: JSON.
        parse: from the reply to its meaning; raises CorruptError for what another try may mend, WrongAnswerError for
            what it cannot. It runs in a thread.
        max_bytes: of the answer; more is refused.
    """

    path: str
    body: dict[str, Any]
    parse: Callable[[Reply], Any]
    max_bytes: int = 1 << 30


@dataclass
class Endpoint:
    """One server."""

    url: str
    client: httpx2.AsyncClient
    slots: asyncio.Semaphore
    waiting: int = 0
    failures: int = 0
    in_a_row: int = 0  # failures since the last answer
    rests_until: float = 0.0  # it failed: others are asked first for a while
    reached: bool = False  # it has answered before
    unverified: int = 0  # connections that broke or are new: another model may answer there now …
    verified: int = 0  # … and how many of them there were when the last check began
    check_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def at(self, path: str) -> str:
        """The URL of a path; an endpoint given as `…/v1` is its server."""
        root = self.url.removesuffix("/v1") if path.startswith("/v1/") else self.url
        return root + path


class TeacherClient:
    """The connection to the endpoints of one teacher.

    Args:
        urls: servers of the same model; a request goes to the one with the fewest waiting.
        api_key: sent as a Bearer token; never shown.
        timeout: seconds a request may take, connection and body included.
        retries: further tries of a request.
        max_concurrent: requests in flight at one endpoint.

    Example:
        >>> client = TeacherClient(["http://127.0.0.1:8000"])
        >>> client.run(client.ask(client.endpoints[0], "/health"))
        >>> client.close()
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None = None,
        timeout: float = default(RemoteTeacherConfig, "timeout"),
        retries: int = default(RemoteTeacherConfig, "retries"),
        max_concurrent: int = default(RemoteTeacherConfig, "max_concurrent"),
    ) -> None:
        self._key, self._timeout, self._retries = api_key, timeout, retries
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="limbeck-teacher", daemon=True)
        self._thread.start()
        self._jitter = random.Random()  # noqa: S311 (pauses only; the run's own generators are left alone)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.endpoints: list[Endpoint] = []
        self.recheck: Callable[[Endpoint], Awaitable[None]] | None = None
        self._warned = 0.0
        limits = httpx2.Limits(max_connections=max_concurrent, max_keepalive_connections=max_concurrent)
        waits = httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS))
        try:
            for url in urls:
                client = httpx2.AsyncClient(headers=headers, timeout=waits, limits=limits, follow_redirects=False)
                self.endpoints.append(Endpoint(url, client, asyncio.Semaphore(max_concurrent)))
        except (ImportError, ValueError) as error:  # a proxy of the environment that httpx2 cannot use
            self.close()
            raise ConfigError(f"HTTP cannot be set up: {error}. Look at ALL_PROXY, HTTP_PROXY and NO_PROXY.") from None

    # -- from other threads ----------------------------------------------------------------------------

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start work in the loop; the future's `cancel` cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work in the loop and wait for it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is in flight and leave."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(timeout=10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)
        if not self._thread.is_alive():
            self._loop.close()
        failed = {one.url: one.failures for one in self.endpoints if one.failures}
        if failed:
            counts = ", ".join(f"{url} {count}" for url, count in failed.items())
            warn(f"requests to the teacher had to be repeated: {counts}")

    async def _shut_down(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.aclose()

    # -- in the loop -----------------------------------------------------------------------------------

    async def ask(
        self, endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, *, patient: bool = True
    ) -> Reply:
        """A GET, or a POST of a body, to find something out; the reply whatever its status, but for those below.

        Args:
            endpoint: who is asked.
            path: below its URL.
            body: JSON.
            patient: wait for an endpoint that says it is not ready, or that has answered before and fails now.

        Raises:
            UnreachableError: nobody answers, and nobody has before.
            UnreadyError: it says that it is not ready (429, 502, 503, 504), for too long.
            RefusedError: it wants another key.
        """
        tried = 0
        while True:
            wait = 0.0
            try:
                reply, _ = await self._once(endpoint, "GET" if body is None else "POST", path, body, 1 << 28)
            except _TransientError as error:
                if not (patient and endpoint.reached and tried < self._retries):
                    raise self._unreachable(endpoint, str(error)) from error
                reason = str(error)
            else:
                endpoint.reached = True
                if reply.status in (401, 403):
                    raise RefusedError(self._denied(endpoint, reply))
                if reply.status not in _LATER:
                    return reply
                reason, wait = f"status {reply.status}: {self.words(reply)}", _retry_after(reply)
                if not patient or tried >= self._retries:
                    raise UnreadyError(f"the teacher at {endpoint.url} is not ready ({reason}). Try again later.")
            pause = max(wait, self._pause(tried))
            self._tell(endpoint, reason, tried, pause)
            await asyncio.sleep(pause)
            tried += 1

    @staticmethod
    def _unreachable(endpoint: Endpoint, reason: str) -> UnreachableError:
        wrong_scheme = " The server speaks plain http://." if "SSL" in reason else ""
        return UnreachableError(
            f"Failed to connect to teacher endpoint: {endpoint.url} ({reason}).{wrong_scheme} Check that the server is "
            "running and listens on that host and port, and that no firewall or proxy stands between (NO_PROXY). To "
            "train without it, cache its targets while it is there (`limbeck teacher cache`) or set training.mode: ce."
        )

    def _tell(self, endpoint: Endpoint, reason: str, tried: int, pause: float) -> None:
        """Warn of a failure, not more than once in five seconds."""
        if time.monotonic() - self._warned > 5.0:
            self._warned = time.monotonic()
            follows = f"try {tried + 2} of {self._retries + 1} in {pause:.1f} s"
            warn(f"teacher endpoint {endpoint.url} does not answer ({reason}); {follows}")

    async def send(self, query: Query) -> Any:
        """Send a query to the least busy endpoint, again if need be; returns what its `parse` returns.

        Raises:
            RefusedError, WrongAnswerError: no second try would help.
            LostError: all tries failed.
        """
        tried, failed = 0, None
        while True:
            endpoint = self._choose(failed)
            endpoint.waiting += 1
            try:
                async with endpoint.slots:
                    await self._recheck(endpoint)
                    found = await self._attempt(endpoint, query)
                    endpoint.in_a_row = 0
                    return found
            except _TransientError as error:
                failed = endpoint
                endpoint.unverified += 1
                endpoint.failures += 1
                if time.monotonic() >= endpoint.rests_until:  # requests that fail together are one failure
                    endpoint.in_a_row += 1
                    rest = max(error.wait, self._pause(endpoint.in_a_row - 1))
                    endpoint.rests_until = time.monotonic() + rest
                if tried >= self._retries:
                    raise LostError(
                        f"the teacher at {endpoint.url} did not answer {tried + 1} times in a row (the last time: "
                        f"{error}). Nothing is lost: start it again and run the same command; what was cached or saved "
                        "is continued. A slow teacher needs a longer teacher.timeout or smaller "
                        "teacher.max_request_tokens, one that takes long to start more teacher.retries. If it runs and "
                        "answers other requests, its own log may say why not this one."
                    ) from None
                pause = max(0.0, self._choose(failed).rests_until - time.monotonic())  # none if another is awake
                if tried >= 1 or pause > 0.0:
                    self._tell(endpoint, str(error), tried, pause)
                elif endpoint.in_a_row == 3 and len(self.endpoints) > 1:
                    warn(f"teacher endpoint {endpoint.url} fails ({error}); the others go on")
                tried += 1
            finally:
                endpoint.waiting -= 1
            await asyncio.sleep(pause)

    def _choose(self, failed: Endpoint | None) -> Endpoint:
        """The endpoint to ask: awake, not the one that has just failed, and with the fewest waiting."""
        now = time.monotonic()

        def burden(one: Endpoint) -> tuple[bool, bool, float, int]:
            rest = max(one.rests_until - now, 0.0)
            return rest > 0.0, one is failed, rest, one.waiting

        return min(self.endpoints, key=burden)

    def _pause(self, tried: int) -> float:
        """Seconds before the next try: doubling, capped, and spread so that clients do not return together."""
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(tried, 20)) * self._jitter.uniform(0.5, 1.5)

    async def _recheck(self, endpoint: Endpoint) -> None:
        """After a failure, and before an answer over a new connection is taken: is it still the same model?

        Only a check that began after the connection changed counts.
        """
        count = endpoint.unverified
        if endpoint.verified >= count or self.recheck is None:
            return
        async with endpoint.check_lock:
            if endpoint.verified >= count:
                return
            began = endpoint.unverified
            try:
                await self.recheck(endpoint)
            except UnreachableError as error:
                raise _TransientError(str(error.__cause__ or error)) from None
            endpoint.verified = max(endpoint.verified, began)

    async def _attempt(self, endpoint: Endpoint, query: Query) -> Any:
        reply, is_new = await self._once(endpoint, "POST", query.path, query.body, query.max_bytes)
        if reply.status in (401, 403):
            raise RefusedError(self._denied(endpoint, reply))
        if reply.status in _LATER or reply.status >= 500:
            raise _TransientError(f"status {reply.status}: {self.words(reply)}", wait=_retry_after(reply))
        if reply.status != 200:
            raise RefusedError(
                f"the teacher at {endpoint.at(query.path)} refused a request with status {reply.status}: "
                f"{self.words(reply)}. `limbeck teacher probe {endpoint.url}` shows what it takes."
            )
        if is_new:
            endpoint.unverified += 1
            await self._recheck(endpoint)
        try:
            return await asyncio.to_thread(query.parse, reply)
        except CorruptError as error:
            raise _TransientError(f"a damaged answer: {error}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise WrongAnswerError(
                f"the answer of {endpoint.at(query.path)} cannot be read ({type(error).__name__}: {str(error)[:120]})."
            ) from None

    async def _once(
        self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None, max_bytes: int
    ) -> tuple[Reply, bool]:
        """A whole reply, and whether a connection was opened for it."""
        url, opened = endpoint.at(path), False

        async def trace(event: str, info: Any) -> None:
            nonlocal opened
            opened = opened or event == "connection.connect_tcp.complete"

        sent = None if body is None else encode_body(body)
        headers = {"accept-encoding": ACCEPTED, **({"content-type": "application/json"} if sent is not None else {})}
        extensions = {"trace": trace}
        request = endpoint.client.stream(method, url, content=sent, headers=headers, extensions=extensions)
        try:
            async with asyncio.timeout(self._timeout), request as response:
                reader = BodyReader(response.headers.get("content-encoding", "").strip().lower(), max_bytes)
                async for chunk in response.aiter_raw():
                    reader.feed(chunk)
                return Reply(response.status_code, response.headers, reader.finish()), opened
        except TooLargeError:
            raise WrongAnswerError(f"{url} answers with more than {max_bytes:,} bytes; that is no answer.") from None
        except DamagedError as error:
            raise _TransientError(str(error)) from None
        except TimeoutError:
            raise _TransientError(f"no whole answer within {self._timeout:g} s") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise RefusedError(f"{url} cannot be asked: {self._hide(str(error))}.") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _TransientError(self._hide(f"{type(error).__name__}: {error}".rstrip(": "))) from None

    def _denied(self, endpoint: Endpoint, reply: Reply) -> str:
        sent = "with the key of teacher.api_key_env" if self._key else "without a key"
        cure = "Check the variable's value" if self._key else "Name the variable that holds it in teacher.api_key_env"
        return f"the teacher at {endpoint.url} wants another key (status {reply.status}, asked {sent}). {cure}."

    def words(self, reply: Reply) -> str:
        """What the server says, short and without the key."""
        text = reply.content[: 4 * _SHOWN].decode("utf-8", errors="replace").strip()
        return printable(" ".join(self._hide(text).split()), _SHOWN) or "no reason given"

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def _retry_after(reply: Reply) -> float:
    """Seconds of a Retry-After header, within reason."""
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(reply.headers.get("retry-after", 0.0))))
    except ValueError:  # a date; the growing pauses do
        return 0.0
