"""What only a live server shows: timing, heartbeats, clients that leave."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, script, wait_until

STEP = 0.02
ENDLESS = Script([[173]] * 100_000, steps=1, step_seconds=STEP)  # 173 is a letter
SILENT = Script([[173]], steps=100_000, step_seconds=STEP)  # never finishes a canvas
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}

Running = tuple[str, FakeEngine]


@pytest.fixture
def run(prompts: PromptRenderer, listening: Any) -> Iterator[Callable[..., Running]]:
    """run(script, settings) -> (address, engine)"""
    with contextlib.ExitStack() as stack:

        def start(said: Script, heartbeat_seconds: float = 10.0) -> Running:
            engine = FakeEngine([said])
            bridge = Bridge(engine)
            bridge.start()
            stack.callback(bridge.close, 0.0)
            app = create_app(ChatService(bridge, prompts, ["demo"]), AppSettings(heartbeat_seconds=heartbeat_seconds))
            return stack.enter_context(listening(app)), engine

        yield start


def steps_until_cancelled(engine: FakeEngine) -> int:
    """Steps the engine made from now until the request ended."""
    before = engine.steps
    wait_until(lambda: engine.ended)
    assert engine.cancelled
    return engine.steps - before


def test_the_role_comes_at_once_and_text_canvas_by_canvas(run: Any) -> None:
    address, _ = run(script("a", "b", "c", steps=5, step_seconds=5 * STEP))
    times, lines = [], []
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
                lines.append(line)
    assert len(lines) == 6  # role, a, b, c, finish, [DONE]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap > 10 * STEP for gap in gaps[:3]), gaps
    assert all(gap < 10 * STEP for gap in gaps[3:]), gaps


def test_heartbeats_while_nothing_is_ready(run: Any) -> None:
    address, _ = run(script("a", steps=20, step_seconds=STEP), heartbeat_seconds=0.05)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.count(": ping") >= 3
    assert all(line == ": ping" or line.startswith("data: ") for line in lines)
    assert lines[0].startswith("data: ")
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("said", [ENDLESS, SILENT], ids=["between canvases", "before the first canvas"])
def test_a_client_that_leaves_a_stream_stops_the_work(run: Any, said: Script) -> None:
    address, engine = run(said)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        lines = answer.iter_lines()  # kept: dropping the iterator closes the connection
        assert next(lines).startswith("data: ")
        wait_until(lambda: engine.steps > 3)
    # The goodbye takes a moment to arrive; then the step under way ends and the next one cancels.
    assert steps_until_cancelled(engine) <= 4
    wait_until(lambda: not engine.has_work)


def test_a_client_that_leaves_without_streaming_stops_the_work(run: Any) -> None:
    address, engine = run(ENDLESS)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(BODY).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: engine.steps > 3)
    assert steps_until_cancelled(engine) <= 4
    wait_until(lambda: not engine.has_work)


def test_a_client_that_leaves_while_waiting_is_taken_off_the_queue(run: Any) -> None:
    address, engine = run(ENDLESS)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**BODY, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**BODY, "stream": True}) as second:
            waiting = second.iter_lines()
            next(waiting)
            wait_until(lambda: len(engine.requests) == 2)
        wait_until(lambda: engine.ended)
        assert engine.ended == [engine.requests[1].id]
        assert next(line for line in lines if "content" in line)
    wait_until(lambda: len(engine.ended) == 2)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    address, engine = run(ENDLESS)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        time.sleep(0.05)
    time.sleep(0.05)
    assert httpx.get(f"{address}/health").status_code == 200
    assert engine.requests == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_two_replies_at_once_and_the_server_still_answers(run: Any) -> None:
    address, engine = run(ENDLESS)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            url = f"{address}/v1/chat/completions"
            stack.enter_context(httpx.stream("POST", url, json={**BODY, "stream": True}))
        wait_until(lambda: len(engine.requests) == 2)
        assert httpx.get(f"{address}/health", timeout=20).status_code == 200
        assert engine.ended == []
    wait_until(lambda: len(engine.ended) == 2)
