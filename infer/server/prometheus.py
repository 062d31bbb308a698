"""Prometheus metrics of a server's requests and of its engine."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import prometheus_client as prometheus
from prometheus_client import core, registry

from infer.text.outputs import Update

Outcome = Literal[
    "answered", "refused", "busy", "unavailable", "client_left", "client_stalled", "failed"
]

_PREFIX = "qwen_jax_"
_SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300,
)  # fmt: skip
_SHORT = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5,
)  # fmt: skip

# Of `Engine.stats`: its names for what only grows, and for what goes up and down.
_COUNTERS = {
    "compilations": "Programs compiled, those of the warm-up included",
    "generated_tokens": "Tokens drawn, also for answers that were cancelled",
    "prompt_tokens": "Prompt tokens read, without those that the prefix cache held",
    "cached_tokens": "Prompt tokens that the prefix cache held",
    "guessed_tokens": "Tokens guessed by speculation, and checked",
    "accepted_tokens": "Those of them that came true",
}
_GAUGES = {
    "waiting": "Answers that wait for a place in the engine",
    "running": "Answers that the engine works on",
    "free_pages": "Pages of keys and values that no request holds",
    "cached_pages": "Pages of them that the prefix cache keeps",
}


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(
        self, *, engine_stats: Callable[[], Mapping[str, float]], open: Callable[[], int]
    ) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            f"{_PREFIX}requests", "Calls, by what became of them", ("endpoint", "outcome"),
            registry=self.registry,
        )  # fmt: skip
        self._seconds = self._histogram("request", "From a call's headers to its end", _SECONDS)
        self._first = self._histogram(
            "time_to_first_token", "From a call's headers to the first token of an answer", _SECONDS
        )
        self._between = self._histogram(
            "time_between_tokens",
            "From one piece of an answer to the next, shared among the tokens that came with it",
            _SHORT,
        )
        self.registry.register(_EngineCollector(engine_stats, open))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> prometheus.Histogram:
        return prometheus.Histogram(
            f"{_PREFIX}{name}_seconds", text, ("endpoint",), buckets=buckets, registry=self.registry
        )

    @contextlib.contextmanager
    def call(self, endpoint: str) -> Iterator["Call"]:
        """Measures one call; the outcome counted is the one set on the yielded `Call`."""
        call = Call(self._first.labels(endpoint), self._between.labels(endpoint))
        try:
            yield call
        finally:
            self._requests.labels(endpoint, call.outcome).inc()
            self._seconds.labels(endpoint).observe(time.monotonic() - call.start)

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)


class Call:
    """Measurements of one call: the times of its tokens, and its outcome."""

    def __init__(self, first: prometheus.Histogram, between: prometheus.Histogram) -> None:
        self.start = time.monotonic()
        self.outcome: Outcome = "failed"
        self._first, self._between = first, between
        self._last: dict[tuple[str, int], float] = {}

    def saw(self, updates: Iterable[Update]) -> None:
        """Records the arrival of the answers' tokens in these updates."""
        now = time.monotonic()
        for update in updates:
            if not update.tokens:
                continue
            before = self._last.get((update.id, update.index))
            self._last[update.id, update.index] = now
            if before is None:
                self._first.observe(now - self.start)
                continue
            for _ in update.tokens:
                self._between.observe((now - before) / len(update.tokens))


class _EngineCollector(registry.Collector):
    """Reads the engine's counters when Prometheus asks."""

    def __init__(self, stats: Callable[[], Mapping[str, float]], open: Callable[[], int]) -> None:
        self._stats, self._open = stats, open

    def collect(self) -> Iterator[core.Metric]:
        stats = self._stats()
        text = "Answers that were asked for and are not complete"
        yield core.GaugeMetricFamily(f"{_PREFIX}open_answers", text, value=self._open())
        for name, text in _COUNTERS.items():
            if name in stats:
                yield core.CounterMetricFamily(f"{_PREFIX}{name}", text, value=stats[name])
        for name, text in _GAUGES.items():
            if name in stats:
                yield core.GaugeMetricFamily(f"{_PREFIX}{name}", text, value=stats[name])
