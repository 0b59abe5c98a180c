"""Spans of a request, without a collector."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.prompt import PromptRenderer
from server.tracing import Tracing
from tests.fakes import FakeEngine, script
from tests.server.conftest import Client

ROOT = Path(__file__).resolve().parents[2]


def test_a_request_is_one_trace(prompts: PromptRenderer) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("unused", version="1", exporter=exporter)
    engine = FakeEngine([script("Hello", "you", steps=4)])
    with Bridge(engine, on_end=tracing.record) as bridge:
        app = create_app(ChatService(bridge, prompts, ["demo"]), AppSettings(span=tracing.span))
        client = Client(engine, app)
        parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "x-request-id": "mine"}
        body = {"messages": [{"role": "user", "content": "a-secret"}]}
        assert client.request("POST", "/v1/chat/completions", json=body, headers=parent).status_code == 200
        assert client.request("POST", "/v1/chat/completions", json=body | {"stream": True}).status_code == 200
        assert client.request("GET", "/nothing").status_code == 404
    tracing.close()
    spans: list[Any] = list(exporter.get_finished_spans())
    assert "a-secret" not in "".join(span.to_json() for span in spans)
    routes = [span for span in spans if "http.response.status_code" in (span.attributes or {})]
    assert [span.name for span in routes] == ["POST /v1/chat/completions"] * 2 + ["GET"]
    assert [span.attributes["http.response.status_code"] for span in routes] == [200, 200, 404]
    assert routes[0].attributes["easel.request_id"] == "mine"
    assert f"{routes[0].context.trace_id:032x}" == "a" * 32
    assert f"{routes[0].parent.span_id:016x}" == "b" * 16
    for route in routes[:2]:
        below = [span for span in spans if span.parent and span.context.trace_id == route.context.trace_id]
        reply = next(span for span in below if span.name == "reply")
        assert reply.parent.span_id == route.context.span_id
        assert reply.attributes["easel.reason"] == "stop"
        stages = [span for span in below if span.parent.span_id == reply.context.span_id]
        assert [span.name for span in stages] == ["wait for a slot", "canvas", "canvas"]
        assert [span.attributes.get("easel.steps") for span in stages] == [None, 4, 4]
        times = [time for span in (*stages, reply) for time in (span.start_time, span.end_time)]
        assert times[1] == times[2]  # what comes next begins where the last ended
        assert sorted(times[:6]) == times[:6]
        assert (times[6], times[7] >= times[5]) == (times[0], True)


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    program = "import sys, server.launch; print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_failure_is_named_and_not_quoted() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("unused", version="1", exporter=exporter)
    scope = {"method": "POST", "path": "/x", "headers": [], "state": {}}
    with pytest.raises(KeyError), tracing.span(scope, "r"):
        raise KeyError("a-secret")
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert "a-secret" not in span.to_json()
    assert (span.attributes or {})["error.type"] == "KeyError"
    assert span.status.status_code.name == "ERROR"
