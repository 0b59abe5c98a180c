"""What happens when the engine breaks, stands still, or clients misbehave; and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from engine import Event, Request
from server.app import AppSettings, create_app
from server.bridge import Bridge, EngineUnavailable
from server.chat import ChatService
from server.connections import Connection
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, script
from tests.server.test_bridge import collect, request

CHAT = "/v1/chat/completions"
LONG = Script([[173]] * 10_000, steps=1, step_seconds=0.001)


def until(condition: Callable[[], Any], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


class StuckEngine(FakeEngine):
    """Its third step ends when the test says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stuck, self.released = threading.Event(), threading.Event()

    def step(self) -> list[Event]:
        if self.steps == 2:
            self.stuck.set()
            self.released.wait(30)
        return super().step()


def test_a_step_that_does_not_end_is_given_up() -> None:
    engine, failures = StuckEngine([LONG]), []
    bridge = Bridge(engine, step_seconds=0.05, on_failure=lambda: failures.append(bridge.failure))
    bridge.start()
    events = asyncio.run(collect(bridge, request()))
    assert events[-1].reason == "error"  # type: ignore[union-attr]
    assert "did not end within 0.05 seconds" in (events[-1].error or "")  # type: ignore[union-attr]
    assert not bridge.ready
    until(lambda: failures)  # told behind the clients, on the watching thread
    assert failures == [bridge.failure]
    with pytest.raises(EngineUnavailable, match="did not end"):
        asyncio.run(collect(bridge, request("late")))
    assert bridge.close() is False
    engine.released.set()
    until(lambda: not any(thread.name == "engine" and thread.is_alive() for thread in threading.enumerate()))
    assert not engine.closed  # nobody knows what it is like now
    assert failures == [bridge.failure]


def test_a_slow_step_is_left_alone() -> None:
    engine = FakeEngine([Script([[1]] * 3, steps=1, step_seconds=0.02)])
    with Bridge(engine, step_seconds=10.0) as bridge:
        assert asyncio.run(collect(bridge, request()))[-1].reason == "stop"  # type: ignore[union-attr]
        assert bridge.ready


def test_closing_does_not_wait_longer_than_it_was_told() -> None:
    engine = StuckEngine([LONG])
    bridge = Bridge(engine)
    bridge.start()
    asking = threading.Thread(target=lambda: asyncio.run(collect(bridge, request())))
    asking.start()
    assert engine.stuck.wait(20)
    assert bridge.close(0, wait_seconds=0.01) is False
    engine.released.set()
    assert bridge.close() is True
    asking.join(20)
    assert not asking.is_alive()


class Breaking(FakeEngine):
    """Breaks in one of the engine's calls."""

    def __init__(self, stage: str, *scripts: Script) -> None:
        super().__init__(scripts)
        self.stage = stage

    def submit(self, request: Request) -> None:
        if self.stage == "submit":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().submit(request)

    def step(self) -> list[Event]:
        if self.stage == {0: "first step", 3: "later step"}.get(self.steps):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step()

    def stats(self) -> Any:
        if self.stage == "stats" and self.steps:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().stats()

    def close(self) -> None:
        super().close()
        if self.stage != "none":
            raise RuntimeError("CUDA error: still")


@pytest.mark.parametrize("stage", ["submit", "first step", "later step", "stats"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_tells_every_client(prompts: PromptRenderer, stage: str, stream: bool) -> None:
    failures: list[bool] = []
    bridge = Bridge(Breaking(stage, script("a", "b", "c", "d")), on_failure=lambda: failures.append(bridge.ready))
    bridge.start()
    with listening(create_app(ChatService(bridge, prompts, ["demo"]), AppSettings())) as address:
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=address, timeout=20) as client:
                return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(5)))

        for answer in asyncio.run(ask()):
            if answer.status_code == 200:
                assert stream
                *_, error, done = [line for line in answer.text.splitlines() if line.startswith("data: ")]
                assert done == "data: [DONE]"
                assert "illegal memory access" in json.loads(error.removeprefix("data: "))["error"]["message"]
            else:
                assert answer.status_code in (500, 503)
                assert answer.json()["error"]["message"]
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
    until(lambda: failures)
    assert failures == [False]
    assert bridge.close() is True


# Clients


class Live:
    """A served scripted engine that clients can be unkind to."""

    def __init__(self, address: str, bridge: Bridge, engine: FakeEngine) -> None:
        self.address, self.bridge, self.engine = address, bridge, engine
        host, _, port = address.removeprefix("http://").partition(":")
        self.at = (host, int(port))

    def send(self, *parts: bytes) -> socket.socket:
        connection = socket.create_connection(self.at)
        for part in parts:
            connection.sendall(part)
        return connection

    def chat(self) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        return httpx.post(self.address + CHAT, json=body, timeout=20)


class Quick(Connection):
    head_seconds = 0.2


@contextlib.contextmanager
def listening(app: Any, http: type[Connection] = Connection) -> Iterator[str]:
    config = uvicorn.Config(
        app, port=0, log_level="critical", lifespan="off", http=http, ws="none", timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not server.server_state.tasks


@pytest.fixture
def live(prompts: PromptRenderer) -> Iterator[Live]:
    engine = FakeEngine([LONG], max_waiting=1000)
    with Bridge(engine) as bridge:
        settings = AppSettings(send_seconds=0.3, body_seconds=0.3)
        with listening(create_app(ChatService(bridge, prompts, ["demo"]), settings), Quick) as address:
            yield Live(address, bridge, engine)


def head(length: int, *, path: str = CHAT) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def asked(**fields: Any) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, **fields}).encode()
    return head(len(body)) + body


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_clients_that_vanish_leave_nothing_behind(live: Live) -> None:
    chance = random.Random(0)
    assert live.chat().status_code == 200
    files, threads = open_files(), threading.active_count()
    vanished = 300
    for _ in range(vanished):
        whole = asked(stream=chance.random() < 0.5)
        connection = live.send(whole[: chance.randint(0, len(whole))] if chance.random() < 0.5 else whole)
        if chance.random() < 0.3:
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                connection.recv(chance.randint(1, 300)) if chance.random() < 0.2 else None
        if chance.random() < 0.5:  # a reset instead of a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    until(lambda: open_files() <= files)
    until(lambda: sorted(live.engine.ended) == sorted(request.id for request in live.engine.requests))
    assert (live.bridge.stats.running, live.bridge.stats.waiting) == ((), ())
    assert threading.active_count() <= threads + 40  # the pool that renders prompts
    assert live.chat().status_code == 200


def test_a_client_that_reads_nothing_loses_its_slot(live: Live) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(live.at)
    connection.sendall(asked(stream=True, logprobs=True, top_logprobs=20))
    until(lambda: live.engine.ended)  # the buffers are full, and nobody reads
    connection.close()
    assert live.chat().status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),  # TLS
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000, 400),
        (head(5) + b"{\xff\xfe}}", 400),
        (head(5) + b"[[[[[", 400),
        (head(100) + b"{", 408),
        (b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (head(11_000_000), 413),
    ],
)  # fmt: skip
def test_what_is_no_request_gets_an_error(live: Live, sent: bytes, status: int) -> None:
    connection = live.send(sent)
    connection.settimeout(20)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in answer or not answer.rstrip().endswith(b"}"):
            part = connection.recv(65536)
            if not part:
                break
            answer += part
    connection.close()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    assert live.chat().status_code == 200


def test_nonsense_behind_an_answer_ends_the_connection(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    chunked = b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection = live.send(chunked)
    connection.settimeout(20)
    answer = b""
    while b"not_found" not in answer:  # it comes before the body has
        answer += connection.recv(65536)
    connection.sendall(b"zz\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert len(connection.recv(65536)) <= len(b'"}}')  # what was left of it
    connection.close()
    assert live.chat().status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_half_a_head_is_cut_off(live: Live) -> None:
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n"):
        connection = live.send(sent)
        connection.settimeout(20)
        assert connection.recv(1) == b""
        connection.close()
    connection = live.send(
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /hea"
    )  # also on a connection that was used
    connection.settimeout(20)
    answer = b""
    while part := connection.recv(65536):
        answer += part
    assert answer.count(b"HTTP/1.1 200") == 1
    connection.close()


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    connection = live.send(b"".join(f"GET /v1/models/{name} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for name in "abc"))
    connection.settimeout(20)
    answer = b""
    while part := connection.recv(65536):
        answer += part
    connection.close()
    assert [answer.find(f"The model '{name}'".encode()) > 0 for name in "abc"] == [True] * 3
    assert answer.find(b"The model 'a'") < answer.find(b"The model 'b'") < answer.find(b"The model 'c'")


def test_a_clock_that_jumps_hurries_nobody(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    now, jumps = time.time(), itertools.cycle([86_400.0, -315_360_000.0, 0.0])
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    for _ in range(5):
        assert live.chat().status_code == 200
    figures = httpx.get(f"{live.address}/stats").json()
    assert figures["requests"]["length"] == 5
    for name in ("uptime_seconds", "queue_wait_seconds", "time_to_first_text_seconds", "canvas_seconds"):
        assert 0 <= figures[name] < 60


def test_two_hundred_clients_at_once(prompts: PromptRenderer) -> None:
    engine = FakeEngine(lambda _: script("Hello", steps=1), max_waiting=1000)
    with Bridge(engine) as bridge:
        with listening(create_app(ChatService(bridge, prompts, ["demo"]), AppSettings())) as address:
            body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}

            async def ask() -> list[httpx.Response]:
                limits = httpx.Limits(max_connections=200)
                async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
                    return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(200)))

            answers = asyncio.run(ask())
        assert [answer.status_code for answer in answers] == [200] * 200
        assert all("Hello" in answer.text and answer.text.endswith("data: [DONE]\n\n") for answer in answers)
        assert (len(engine.ended), engine.has_work) == (200, False)
