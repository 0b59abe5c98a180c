"""What is counted and timed, on the scripted engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import CanvasDone, EngineInfo, EngineStats, Finished, PoolStats, Usage
from engine.interface import DeviceMemory
from server.metrics import Metrics, Timeline
from tests.fakes import FakeEngine, Script, script

Serve = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(client: Any) -> Callable[..., float]:
    answer = client.request("GET", "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    return lambda name, **labels: found[name, frozenset(labels.items())]


def test_a_reply_is_counted_where_it_belongs(serve: Serve) -> None:
    client = serve(script("Hello", "you", steps=4))
    answer = client.chat()
    assert answer.status_code == 200
    value = read(client)
    assert value("easel_requests_total", reason="stop") == 1
    assert value("easel_requests_total", reason="error") == 0
    assert value("easel_canvas_steps_count") == 2
    assert value("easel_canvas_steps_sum") == 8
    assert value("easel_denoise_steps_total") == 8
    assert value("easel_completion_tokens_total") == answer.json()["usage"]["completion_tokens"] - 1  # without eos
    assert value("easel_queue_wait_seconds_count") == 1
    assert value("easel_canvas_seconds_count") == 2
    assert value("easel_time_to_first_text_seconds_count") == 1
    assert value("easel_tokens_per_forward_count") == 1
    assert value("easel_cancellations_total") == 0
    assert value("easel_requests_running") == 0


def test_stats_tell_people_the_same(serve: Serve) -> None:
    client = serve(script("Hello", steps=4), script("x", "y", reason="error", error="broken", steps=1))
    before = client.request("GET", "/stats").json()
    assert before["tokens_per_second"] == 0
    assert before["steps_per_canvas"] is None
    client.chat()
    client.chat()
    after = client.request("GET", "/stats").json()
    assert set(after) == set(before)
    assert (after["model"], after["ready"], after["running"], after["waiting"]) == ("demo", True, 0, 0)
    assert after["requests"] == {"stop": 1, "length": 0, "cancelled": 0, "error": 1}
    assert after["tokens_per_second"] > 0
    assert after["steps_per_canvas"] == 2  # 4, 1 and 1
    assert after["cache"]["prompt_tokens"] > 0


def test_a_dead_engine_counts_as_an_error(serve: Serve) -> None:
    client = serve(script("a"), crash_at_step=1)
    client.chat()
    assert read(client)("easel_requests_total", reason="error") == 1
    assert client.request("GET", "/stats").json()["ready"] is False


def fixed_metrics() -> Metrics:
    stats = EngineStats(
        slots=4,
        running=("a",),
        waiting=("b", "c"),
        pools={"full": PoolStats(pages=10, held=3, kept=5, evictions=7)},
        prompt_tokens=100,
        cached_tokens=25,
        committed_tokens=80,
        preemptions=2,
        memory=DeviceMemory(used=6, total=8),
    )
    info: EngineInfo = FakeEngine([Script()]).info
    return Metrics(info, lambda: stats)


def test_what_the_engine_says_is_passed_on() -> None:
    metrics = fixed_metrics()
    found = samples(metrics.exposition().decode())
    for state, count in (("held", 3), ("kept", 5), ("free", 2)):
        assert found["easel_pages", frozenset({("layers", "full"), ("state", state)})] == count
    assert found["easel_page_evictions_total", frozenset({("layers", "full")})] == 7
    assert found["easel_gpu_memory_bytes", frozenset({("state", "used")})] == 6
    assert found["easel_cached_tokens_total", frozenset()] == 25
    document = metrics.document()
    assert document["pages"]["full"] == {"total": 10, "held": 3, "kept": 5, "free": 2, "evictions": 7}
    assert document["cache"] == {"prompt_tokens": 100, "cached_tokens": 25, "hit_rate": 0.25}
    assert document["gpu_memory"] == {"used_bytes": 6, "total_bytes": 8}
    assert (document["running"], document["waiting"], document["preemptions"]) == (1, 2, 2)


def test_times_are_taken_from_one_thing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, timeline = fixed_metrics(), Timeline(submitted=10.0)
    clock = iter([15.0, 16.5, 17.0])
    monkeypatch.setattr("server.metrics.time.monotonic", lambda: next(clock))
    metrics.seated(timeline, 12.0)
    for index in range(2):
        metrics.happened(timeline, CanvasDone(request_id="a", index=index, token_ids=(1, 2, 3), steps=4))
    usage = Usage(prompt_tokens=1, completion_tokens=6, canvases=2, denoise_steps=12, redrawn_canvases=1)
    metrics.happened(timeline, Finished(request_id="a", reason="stop", usage=usage))
    monkeypatch.undo()
    found = samples(metrics.exposition().decode())
    assert found["easel_queue_wait_seconds_sum", frozenset()] == 2.0
    assert found["easel_canvas_seconds_sum", frozenset()] == 3.0 + 1.5
    assert found["easel_tokens_per_forward_sum", frozenset()] == 0.5
    assert found["easel_redrawn_canvases_total", frozenset()] == 1
    assert timeline.canvases == [(15.0, 4), (16.5, 4)]
    assert (timeline.ended, timeline.reason) == (17.0, "stop")


def test_the_dashboard_asks_for_what_there_is(serve: Serve) -> None:
    client = serve(script("Hello"))
    client.chat()
    families = list(text_string_to_metric_families(client.request("GET", "/metrics").text))
    families += text_string_to_metric_families(fixed_metrics().exposition().decode())
    exported: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:easel|process)_\w+", query)}
    assert asked <= set(exported)
    for query in queries:
        (name, *_) = re.findall(r"\b(?:easel|process)_\w+", query)
        for labels in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in labels.split(",")} <= exported[name], query
    # And everything is shown, but for what only says how a histogram was made.
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    ours = {name for name in exported if name.startswith("easel_") and not name.endswith("_created")}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    assert {name for name in ours - shown if not name.startswith("easel_model_info")} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
