"""The server's numbers for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATHS = {"/v1/targets", "/v1/topk", "/v1/completions", "/v1/teacher", "/health", "/metrics", "/openapi.json"}


class ServerMetrics:
    """Counters of one server; each server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("limbeck_requests", "Requests by path and status", ["path", "status"],
                                 registry=self.registry)  # fmt: skip
        self._seconds = Histogram("limbeck_request_seconds", "Seconds of a request", ["path"], registry=self.registry)
        self._tokens = Counter("limbeck_tokens", "Tokens run through the model", registry=self.registry)
        self._passes = Counter("limbeck_passes", "Jobs run together count as one pass", registry=self.registry)
        self._jobs = Counter("limbeck_jobs", "Jobs run", registry=self.registry)
        self._busy = Counter("limbeck_busy_seconds", "Seconds the model ran", registry=self.registry)
        self._waiting = Gauge("limbeck_waiting_tokens", "Tokens in the queue", registry=self.registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; unknown paths are one, so that a scan cannot fill the memory."""
        known = path if path in _PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def a_pass(self, jobs: int, tokens: int, seconds: float) -> None:
        """Count a pass of the engine."""
        self._passes.inc()
        self._jobs.inc(jobs)
        self._tokens.inc(tokens)
        self._busy.inc(seconds)

    def text(self, waiting_tokens: int) -> bytes:
        """All of it in Prometheus' text format."""
        self._waiting.set(waiting_tokens)
        return generate_latest(self.registry)
