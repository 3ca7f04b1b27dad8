"""Prometheus metrics, with label values that cannot grow without bound."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sidecar.attempt import Call, Ended
from sidecar.fleet import Fleet
from sidecar.model import Pool
from sidecar.verdict import Verdict

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OWN_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
_MAX_MODELS = 100
_OTHER = "other"


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self, fleet: Fleet, started: float, sizes: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        self._fleet = fleet
        self._models: set[str] = set()
        self._known: Callable[[], set[str]] = set
        self._children: dict[tuple[str, str, str], _Children] = {}
        registry = self.registry
        labels = ("backend", "model")
        self.requests = Counter(
            "sidecar_requests", "Requests of callers", ("path", "status"), registry=registry
        )
        self.attempts = Counter(
            "sidecar_attempts", "Attempts at backends", (*labels, "verdict"), registry=registry
        )
        self.errors = Counter("sidecar_errors", "Failed attempts", (*labels, "verdict"), registry=registry)
        self.tokens = Counter("sidecar_tokens", "Tokens", (*labels, "kind"), registry=registry)
        self.cost = Counter("sidecar_cost", "US dollars", labels, registry=registry)
        self.latency = Histogram(
            "sidecar_latency_seconds", "Attempt to end", labels, buckets=_SECONDS, registry=registry
        )
        self.ttft = Histogram(
            "sidecar_ttft_seconds", "Request to first token", labels, buckets=_SECONDS, registry=registry
        )
        self.overhead = Histogram(
            "sidecar_overhead_seconds", "Time a request spent in the sidecar itself", buckets=_OWN_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tries = Histogram(
            "sidecar_attempts_per_request",
            "Attempts per request",
            buckets=(0, 1, 2, 3, 5, 10),
            registry=registry,
        )
        self.wait = Histogram(
            "sidecar_queue_wait_seconds", "Time in line", buckets=_SECONDS, registry=registry
        )
        self.gen_ai_tokens = Counter(
            "gen_ai_client_token_usage", "Tokens (GenAI conventions)",
            ("gen_ai_request_model", "gen_ai_token_type"), registry=registry,
        )  # fmt: skip
        self.providers = Gauge("sidecar_pool_providers", "Backends", ("pool", "type"), registry=registry)
        for name, text, read in (
            ("sidecar_cooldown_active", "Backends resting now", self._cooling),
            ("sidecar_emergency_count", "Starts through the emergency lane", lambda: fleet.emergencies),
            ("sidecar_queue_depth", "Requests waiting", lambda: fleet.queued),
            ("sidecar_uptime_seconds", "Seconds since the start", lambda: fleet.clock.now() - started),
            ("sidecar_db_size_bytes", "Size of the database", lambda: sizes()[0]),
            ("sidecar_wal_size_bytes", "Size of its write-ahead log", lambda: sizes()[1]),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        self._request_children: dict[tuple[str, int], Counter] = {}
        fleet.on_wait = self.wait.observe

    def know(self, models: Callable[[], set[str]]) -> None:
        """Where the configured model names come from; any other becomes `other` after a while."""
        self._known = models

    def _cooling(self) -> float:
        now = self._fleet.clock.now()
        return sum(lane.resting(now) for lane in self._fleet.lanes.values())

    def _model(self, model: str) -> str:
        if model in self._models:
            return model
        if len(self._models) >= _MAX_MODELS or (model not in self._known() and self._known()):
            return _OTHER
        self._models.add(model)
        return model

    def attempt(self, ended: Ended, model: str) -> None:
        """An attempt has ended."""
        name = self._model(model)
        key = (ended.backend_id, name, ended.verdict.value)
        children = self._children.get(key)
        if children is None:
            if len(self._children) > _MAX_MODELS * 20:
                self._children.clear()
            children = self._children[key] = _Children(self, *key)
        children.count(ended)
        if self._fleet.hot.gen_ai_metrics:
            self.gen_ai_tokens.labels(name, "input").inc(ended.usage.prompt)
            self.gen_ai_tokens.labels(name, "output").inc(ended.usage.completion)

    def request(self, call: Call, status: int, seconds: float) -> None:
        """A caller's request has ended."""
        key = (call.endpoint.path, status)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_children[key] = self.requests.labels(key[0], str(status))
        child.inc()
        self.tries.observe(call.attempts)
        self.overhead.observe(max(0.0, seconds - call.upstream_seconds))

    def text(self) -> bytes:
        """The exposition format."""
        now = self._fleet.clock.now()
        states = ("healthy", "cooling", "error", "disabled")
        states = ("healthy", "cooling", "error", "disabled")
        counts: dict[tuple[str, str], int] = {(pool.value, state): 0 for pool in Pool for state in states}
        for lane in self._fleet.lanes.values():
            counts[lane.backend.pool.value, lane.status(now)] += 1
        for (pool, kind), number in counts.items():
            self.providers.labels(pool, kind).set(number)
        return generate_latest(self.registry)


class _Children:
    """The bound metrics of one backend, model and verdict: looking labels up costs more than counting."""

    __slots__ = ("_attempts", "_completion", "_cost", "_errors", "_latency", "_prompt", "_ttft")

    def __init__(self, metrics: Metrics, backend: str, model: str, verdict: str) -> None:
        self._attempts = metrics.attempts.labels(backend, model, verdict)
        self._errors = None if verdict == Verdict.OK else metrics.errors.labels(backend, model, verdict)
        self._prompt = metrics.tokens.labels(backend, model, "prompt")
        self._completion = metrics.tokens.labels(backend, model, "completion")
        self._cost = metrics.cost.labels(backend, model)
        self._latency = metrics.latency.labels(backend, model)
        self._ttft = metrics.ttft.labels(backend, model)

    def count(self, ended: Ended) -> None:
        """Count one attempt."""
        self._attempts.inc()
        if self._errors is not None:
            self._errors.inc()
        self._prompt.inc(ended.usage.prompt)
        self._completion.inc(ended.usage.completion)
        self._cost.inc(ended.cost)
        self._latency.observe(ended.seconds)
        if ended.ttft is not None:
            self._ttft.observe(ended.ttft)
