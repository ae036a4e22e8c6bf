"""What the server tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATHS = frozenset(
    {"/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/embeddings", "/tokenize", "/detokenize",
     "/health", "/metrics", "/openapi.json"}
)  # fmt: skip
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ChatMetrics:
    """Counters of one server, in a registry of its own.

    Args:
        waiting, active: texts in the queue, and in work.
        cache_bytes: memory of all texts.
    """

    def __init__(
        self, waiting: Callable[[], float], active: Callable[[], float], cache_bytes: Callable[[], float]
    ) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Counter(
            "limbeck_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self._seconds = Histogram("limbeck_request_seconds", "Seconds of a request", ["path"], registry=registry)
        self.prompt_tokens = Counter("limbeck_prompt_tokens", "Tokens of prompts", registry=registry)
        self.new_tokens = Counter("limbeck_new_tokens", "Tokens written", registry=registry)
        self.first = Histogram(
            "limbeck_time_to_first_token_seconds",
            "From request to first token",
            buckets=(*_SHORT, 10.0, 30.0),
            registry=registry,
        )
        self._step = Histogram(
            "limbeck_step_seconds", "Seconds of a step: of a token", buckets=_SHORT, registry=registry
        )
        self._texts = Counter("limbeck_step_texts", "Texts in all steps", registry=registry)
        self._tokens = Counter("limbeck_step_tokens", "Tokens in all steps, of prompts too", registry=registry)
        for name, text, value in (
            ("limbeck_waiting_texts", "Texts in the queue", waiting),
            ("limbeck_active_texts", "Texts in work", active),
            ("limbeck_cache_bytes", "Memory of keys, values and states", cache_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; unknown paths are one, so that a scan cannot fill the memory."""
        known = path if path in _PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def step(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a step of the engine."""
        self._step.observe(seconds)
        self._texts.inc(texts)
        self._tokens.inc(tokens)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
