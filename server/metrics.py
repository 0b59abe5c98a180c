"""What the server counts and times: for Prometheus, and as one document for people and tools.

Knows the engine's events and statistics, no HTTP and no text: nothing here can tell what anybody wrote. Counts that
the engine keeps itself are read off its statistics when asked for, not counted twice. Invariant: recording never
fails and never waits, so it may be done from the engine's thread and from the event loop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine import CanvasDone, CanvasDraft, EngineInfo, EngineStats, Event, Finished, FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WINDOW_SECONDS = 10.0  # what "tokens per second" is taken over
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_STEPS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
_TOKENS_PER_FORWARD = (0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


@dataclass
class Timeline:
    """When what happened to one request, by `time.monotonic`. Written by the engine's thread."""

    submitted: float = field(default_factory=time.monotonic)
    seated: float | None = None  # a slot was given
    canvases: list[tuple[float, int]] = field(default_factory=list)  # (delivered at, denoise passes)
    ended: float | None = None
    reason: FinishReason | None = None

    @property
    def latest(self) -> float:
        """When the request last came forward."""
        return self.canvases[-1][0] if self.canvases else self.seated or self.submitted


class Metrics:
    """The counts of one server. `stats` is asked whenever somebody reads them."""

    def __init__(self, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        self._info, self._engine_stats = info, stats
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, int]] = deque()  # (when, tokens) of canvases delivered lately
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(info, stats))
        ProcessCollector(registry=self.registry)
        self._http = self._counter("http_requests", "Answers by route, method and status.", "route", "method", "status")
        self._http_seconds = self._histogram("http_request_seconds", "Until the last byte.", _SECONDS, "route")
        self._finished = self._counter("requests", "Requests that ended, by how.", "reason")
        self._cancellations = self._counter("cancellations", "Requests dropped by their client or the time limit.")
        self._queue_wait = self._histogram("queue_wait_seconds", "From acceptance until a slot was given.", _SECONDS)
        self._first_text = self._histogram(
            "time_to_first_text_seconds", "From the request until the first text could be sent.", _SECONDS
        )
        self._canvas_seconds = self._histogram(
            "canvas_seconds", "From the slot (prompt included) or the canvas before until a canvas was done.", _SECONDS
        )
        self._canvas_steps = self._histogram("canvas_steps", "Denoise passes of a canvas.", _STEPS)
        self._per_forward = self._histogram(
            "tokens_per_forward", "Reply tokens per denoise pass of a reply.", _TOKENS_PER_FORWARD
        )
        self._tokens = self._counter("completion_tokens", "Reply tokens delivered.")
        self._steps = self._counter(
            "denoise_steps", "Denoise passes of replies that ended, re-drawn canvases included."
        )
        self._redrawn = self._counter("redrawn_canvases", "Canvases drawn again because they did not converge.")
        for reason in get_args(FinishReason):
            self._finished.labels(reason)

    def http(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """One answer was sent."""
        self._http.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def seated(self, timeline: Timeline, now: float) -> None:
        """A request got a slot."""
        timeline.seated = now
        self._queue_wait.observe(now - timeline.submitted)

    def happened(self, timeline: Timeline, event: Event) -> None:
        """A request came forward."""
        if isinstance(event, CanvasDraft):
            return
        now = time.monotonic()
        if isinstance(event, Finished):
            self._end(timeline, event, now)
            return
        self._canvas_seconds.observe(now - timeline.latest)
        self._canvas_steps.observe(event.steps)
        timeline.canvases.append((now, event.steps))
        if isinstance(event, CanvasDone):
            self._tokens.inc(len(event.token_ids))
            with self._lock:
                self._recent.append((now, len(event.token_ids)))
                self._forget(now)

    def first_text(self, seconds: float) -> None:
        """A reply's first text could be sent."""
        self._first_text.observe(seconds)

    def cancelled(self) -> None:
        """A caller left its request before it ended."""
        self._cancellations.inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)

    def tokens_per_second(self) -> float:
        """Reply tokens delivered per second, over the last WINDOW_SECONDS."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            tokens = sum(count for _, count in self._recent)
        return tokens / min(WINDOW_SECONDS, max(now - self._began, 1.0))

    def document(self) -> dict[str, Any]:
        """The same for people and tools, as one JSON object. Means are over everything since the start."""
        stats = self._engine_stats()
        steps, tokens = self._value(self._steps), self._value(self._tokens)
        return {
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "slots": stats.slots,
            "running": len(stats.running),
            "waiting": len(stats.waiting),
            "tokens_per_second": round(self.tokens_per_second(), 2),
            "tokens_per_forward": round(tokens / steps, 3) if steps else None,
            "steps_per_canvas": self._mean(self._canvas_steps),
            "canvas_seconds": self._mean(self._canvas_seconds),
            "queue_wait_seconds": self._mean(self._queue_wait),
            "time_to_first_text_seconds": self._mean(self._first_text),
            "pages": {
                kind: {
                    "total": pool.pages,
                    "held": pool.held,
                    "kept": pool.kept,
                    "free": pool.pages - pool.held - pool.kept,
                    "evictions": pool.evictions,
                }
                for kind, pool in stats.pools.items()
            },
            "cache": {
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "hit_rate": round(stats.cached_tokens / stats.prompt_tokens, 4) if stats.prompt_tokens else None,
            },
            "requests": {reason: int(self._value(self._finished, reason=reason)) for reason in get_args(FinishReason)},
            "cancellations": int(self._value(self._cancellations)),
            "preemptions": stats.preemptions,
            "completion_tokens": int(tokens),
            "committed_tokens": stats.committed_tokens,
            "denoise_steps": int(steps),
            "redrawn_canvases": int(self._value(self._redrawn)),
            "gpu_memory": None
            if stats.memory is None
            else {"used_bytes": stats.memory.used, "total_bytes": stats.memory.total},
        }

    def _end(self, timeline: Timeline, finished: Finished, now: float) -> None:
        timeline.ended, timeline.reason = now, finished.reason
        usage = finished.usage
        self._finished.labels(finished.reason).inc()
        self._steps.inc(usage.denoise_steps)
        self._redrawn.inc(usage.redrawn_canvases)
        if usage.denoise_steps and usage.completion_tokens:
            self._per_forward.observe(usage.completion_tokens / usage.denoise_steps)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - WINDOW_SECONDS:
            self._recent.popleft()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"easel_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"easel_{name}", what, labels, buckets=buckets, registry=self.registry)

    def _value(self, counter: Counter, **labels: str) -> float:
        name = next(iter(counter.describe())).name
        return self.registry.get_sample_value(f"{name}_total", labels) or 0.0

    def _mean(self, histogram: Histogram) -> float | None:
        name = next(iter(histogram.describe())).name
        count = self.registry.get_sample_value(f"{name}_count")
        total = self.registry.get_sample_value(f"{name}_sum")
        return round(total / count, 4) if count and total is not None else None


class _EngineCollector(Collector):
    """What the engine says of itself, at the moment somebody reads."""

    def __init__(self, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        self._info, self._stats = info, stats

    def collect(self) -> Iterator[Metric]:
        info, stats = self._info, self._stats()
        model = GaugeMetricFamily(
            "easel_model_info", "What is loaded; always 1.", labels=["device", "format", "dtype", "kernels"]
        )
        model.add_metric([info.device, info.format, info.dtype, info.kernels], 1)
        yield model
        yield GaugeMetricFamily("easel_slots", "Requests served at a time.", stats.slots)
        yield GaugeMetricFamily("easel_requests_running", "Requests in slots.", len(stats.running))
        yield GaugeMetricFamily("easel_requests_waiting", "Requests waiting for a slot.", len(stats.waiting))
        yield CounterMetricFamily("easel_prompt_tokens", "Of requests that got a slot.", stats.prompt_tokens)
        yield CounterMetricFamily("easel_cached_tokens", "Prompt tokens found in the cache.", stats.cached_tokens)
        yield CounterMetricFamily("easel_committed_tokens", "Of prompts and replies.", stats.committed_tokens)
        yield CounterMetricFamily("easel_preemptions", "Requests that lost their slot for a while.", stats.preemptions)
        pages = GaugeMetricFamily("easel_pages", "Pages of keys and values.", labels=["layers", "state"])
        evictions = CounterMetricFamily("easel_page_evictions", "Kept pages given away.", labels=["layers"])
        for kind, pool in stats.pools.items():
            free = pool.pages - pool.held - pool.kept
            for state, count in (("held", pool.held), ("kept", pool.kept), ("free", free)):
                pages.add_metric([kind, state], count)
            evictions.add_metric([kind], pool.evictions)
        yield pages
        yield evictions
        memory = GaugeMetricFamily("easel_gpu_memory_bytes", "Of the GPU, whoever uses it.", labels=["state"])
        if stats.memory is not None:
            memory.add_metric(["used"], stats.memory.used)
            memory.add_metric(["total"], stats.memory.total)
        yield memory


def merged(expositions: Mapping[str, bytes]) -> bytes:
    """The expositions of several servers as one, each sample with a label `replica` that says whose it is."""
    families: dict[str, Metric] = {}
    for replica, exposition in expositions.items():
        for family in text_string_to_metric_families(exposition.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
