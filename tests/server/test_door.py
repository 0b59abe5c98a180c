"""The address before several replicas: each of them an app of its own, in this process, around a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message, Scope

from server import door
from server.access import Keys, Names
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.door import REFUSED, ReplicaGone, Report, create_door, run
from server.prompt import PromptRenderer
from server.sessions import Wish, rank, response_tag
from tests.fakes import FakeEngine, Script, script, wait_until

STEP = 0.02
HELLO = script("Hello", " you")
ENDLESS = Script([[173]] * 100_000, steps=1, step_seconds=STEP)  # 173 is a letter
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
# One body for each way in which a stream tells of errors.
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "stream": True},
    "/v1/completions": {"model": "demo", "prompt": "Hi", "max_tokens": 9000, "stream": True},
    "/v1/responses": {"model": "demo", "input": "Hi", "stream": True},
    "/v1/messages": {**CHAT, "max_tokens": 9000, "stream": True},
}


class OneReplica:
    """A replica that can be lost, before it answers or after so many messages."""

    def __init__(self, name: str, app: ASGIApp, engine: FakeEngine, bridge: Bridge) -> None:
        self.name, self.app, self.engine, self.bridge = name, app, engine, bridge
        self.lost_after: int | None = None
        self.refuses = False


class Chosen:
    def __init__(self, at: OneReplica) -> None:
        self._at, self.replica = at, at.name

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        json.dumps({name: str(value) for name, value in scope.items()})  # nothing in it that stays in a process
        if self._at.refuses:
            yield REFUSED
            return
        sent = 0
        async with contextlib.aclosing(run(self._at.app, scope, body)) as messages:
            async for message in messages:
                if sent == self._at.lost_after:
                    raise ReplicaGone("killed")
                yield message
                sent += 1


class Several:
    """The replicas of one test."""

    def __init__(self, replicas: Sequence[OneReplica]) -> None:
        self.by_name = {replica.name: replica for replica in replicas}
        self.wishes: list[Wish] = []

    def __getitem__(self, name: str) -> OneReplica:
        return self.by_name[name]

    @contextlib.asynccontextmanager
    async def choose(self, wish: Wish) -> AsyncIterator[Chosen]:
        self.wishes.append(wish)
        yield Chosen(self.by_name[rank(list(self.by_name), wish, {}, seats=4)[0]])

    async def reports(self) -> Sequence[Report]:
        return [
            Report(
                replica=each.name,
                ready=each.bridge.ready,
                stats=each.bridge.metrics.document(),
                exposition=each.bridge.metrics.exposition(),
            )
            for each in self.by_name.values()
        ]


Built = tuple[str, Several]


@pytest.fixture
def build(prompts: PromptRenderer, listening: Any) -> Iterator[Callable[..., Built]]:
    """build(script, settings) -> (address, replicas)"""
    with contextlib.ExitStack() as stack:

        def start(said: Script = HELLO, called: Sequence[str] = ("a1", "b2"), **options: Any) -> Built:
            replicas = []
            for name in called:
                engine = FakeEngine([said])
                bridge = Bridge(engine)
                bridge.start()
                stack.callback(bridge.close, 0.0)
                told = AppSettings(**options, response_tag=response_tag(name))
                app = create_app(ChatService(bridge, prompts, ["demo"]), told)
                replicas.append(OneReplica(name, app, engine, bridge))
            several = Several(replicas)
            return stack.enter_context(listening(create_door(several, AppSettings(**options)))), several

        yield start


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def test_a_conversation_stays_at_its_replica_and_others_use_the_other(build: Callable[..., Built]) -> None:
    address, _ = build()
    homes = set()
    for number in range(12):
        messages = [{"role": "user", "content": f"Question {number}"}]
        where = set()
        for _ in range(3):
            answer = httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "messages": messages})
            assert answer.json()["choices"][0]["message"]["content"] == "Hello you"
            where.add(answer.headers["x-easel-replica"])
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "And?"}]
        assert len(where) == 1
        homes |= where
    assert homes == {"a1", "b2"}


def test_a_response_is_gone_on_from_where_it_is_kept(build: Callable[..., Built]) -> None:
    address, _ = build()
    for number in range(6):
        made = httpx.post(f"{address}/v1/responses", json={"model": "demo", "input": f"Question {number}"})
        home, response_id = made.headers["x-easel-replica"], made.json()["id"]
        assert response_id.startswith(f"resp_{home}_")
        following = {"model": "demo", "input": "And?", "previous_response_id": response_id}
        # A session that was at home elsewhere must follow the response, too.
        next_one = httpx.post(f"{address}/v1/responses", json=following, headers={"x-session-id": f"s{number}"})
        assert (next_one.status_code, next_one.headers["x-easel-replica"]) == (200, home)
        assert httpx.get(f"{address}/v1/responses/{response_id}").json()["id"] == response_id
        assert httpx.delete(f"{address}/v1/responses/{response_id}").json()["deleted"] is True
        assert httpx.get(f"{address}/v1/responses/{response_id}").status_code == 404


def test_streams_come_canvas_by_canvas(build: Callable[..., Built]) -> None:
    address, _ = build(script("a", "b", "c", steps=5, step_seconds=5 * STEP))
    times = []
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=STREAMS["/v1/chat/completions"]) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 5  # role, a, b, c, finish, [DONE]
    assert all(gap > 10 * STEP for gap in gaps[:3]), gaps


def test_a_client_that_leaves_a_stream_stops_the_work(build: Callable[..., Built]) -> None:
    address, replicas = build(ENDLESS, called=("a1",))
    engine = replicas["a1"].engine
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=STREAMS["/v1/chat/completions"]) as answer:
        lines = answer.iter_lines()
        next(lines)
        wait_until(lambda: engine.steps > 3)
    wait_until(lambda: engine.ended)
    assert engine.cancelled
    wait_until(lambda: not engine.has_work)


def test_a_client_that_leaves_without_streaming_stops_the_work(build: Callable[..., Built]) -> None:
    address, replicas = build(ENDLESS, called=("a1",))
    engine = replicas["a1"].engine
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(CHAT).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.steps > 3)
    wait_until(lambda: engine.ended)
    assert engine.cancelled


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_whose_replica_is_lost_ends_with_an_error_event(build: Callable[..., Built], path: str) -> None:
    address, replicas = build()
    replicas["a1"].lost_after = replicas["b2"].lost_after = 3  # the head and two events
    answer = httpx.post(f"{address}{path}", json=STREAMS[path])
    assert answer.status_code == 200
    told = events(answer.text)
    if path != "/v1/messages":
        assert (told[-1] == "[DONE]") is True
        told.pop()
    *before, last = told
    assert len(before) == 2
    assert "replica" in last["error"]["message"]
    if path == "/v1/responses":
        assert [each["sequence_number"] for each in told] == [0, 1, 2]
    if path in ("/v1/responses", "/v1/messages"):
        assert last["type"] == "error"
        assert answer.text.count("event: error\n") == 1
    wait_until(lambda: all(not each.engine.has_work for each in replicas.by_name.values()))


@pytest.mark.parametrize("path", STREAMS)
def test_a_request_whose_replica_is_lost_at_once_gets_a_status(build: Callable[..., Built], path: str) -> None:
    address, replicas = build()
    replicas["a1"].lost_after = replicas["b2"].lost_after = 0
    answer = httpx.post(f"{address}{path}", json={**STREAMS[path], "stream": False})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "replica" in answer.json()["error"]["message"]
    assert ("type" in answer.json()) is (path == "/v1/messages")


def test_half_a_body_does_not_look_whole(build: Callable[..., Built]) -> None:
    address, replicas = build()
    replicas["a1"].lost_after = replicas["b2"].lost_after = 1  # the head alone
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{address}/v1/chat/completions", json=CHAT)


def test_who_refuses_is_passed_over(build: Callable[..., Built]) -> None:
    address, replicas = build()
    home = httpx.post(f"{address}/v1/chat/completions", json=CHAT).headers["x-easel-replica"]
    replicas[home].refuses = True
    answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200
    assert answer.headers["x-easel-replica"] != home
    replicas[answer.headers["x-easel-replica"]].refuses = True
    answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")


def test_requests_that_run_are_counted_while_they_do(build: Callable[..., Built]) -> None:
    address, replicas = build(ENDLESS, called=("a1",))
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=STREAMS["/v1/chat/completions"]) as answer:
        lines = answer.iter_lines()  # kept: dropping the iterator closes the connection
        next(lines)
        httpx.get(f"{address}/v1/models")
    assert replicas.wishes[-1].running == {"a1": 1}
    wait_until(lambda: not replicas["a1"].engine.has_work)

    def counted() -> int:
        httpx.get(f"{address}/v1/models")
        return replicas.wishes[-1].running.get("a1", 0)

    wait_until(lambda: counted() == 0)


class Nobody:
    """There are no replicas, yet or any more."""

    @contextlib.asynccontextmanager
    async def choose(self, wish: Wish) -> AsyncIterator[Chosen]:
        await asyncio.Event().wait()
        raise AssertionError
        yield

    async def reports(self) -> Sequence[Report]:
        return []


def test_without_replicas_there_is_an_answer_all_the_same(listening: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_CHOOSE_SECONDS", 0.1)
    with listening(create_door(Nobody(), AppSettings())) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for path in ("/ready", "/stats"):
            assert httpx.get(f"{address}{path}").status_code == 503
        assert httpx.get(f"{address}/metrics").text == ""
        answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_replica_that_never_answers_is_given_up(build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_LATE_SECONDS", -0.6)  # before the replica itself would say so
    address, replicas = build(ENDLESS, called=("a1",), request_seconds=0.8)
    assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 504
    told = events(httpx.post(f"{address}/v1/chat/completions", json=STREAMS["/v1/chat/completions"]).text)
    assert told[-2]["error"]["code"] == "request_timeout"
    wait_until(lambda: not replicas["a1"].engine.has_work)


def test_it_is_ready_while_one_replica_is(build: Callable[..., Built]) -> None:
    address, replicas = build()
    assert httpx.get(f"{address}/ready").json() == {"status": "ready"}
    replicas["a1"].bridge.close()
    assert httpx.get(f"{address}/ready").status_code == 200
    replicas["b2"].bridge.close()
    assert httpx.get(f"{address}/ready").status_code == 503


def test_statistics_of_one_and_of_all(build: Callable[..., Built]) -> None:
    address, _ = build()
    home = httpx.post(f"{address}/v1/chat/completions", json=CHAT).headers["x-easel-replica"]
    stats = httpx.get(f"{address}/stats").json()
    assert (stats["replica"], stats["replicas"]) == ("a1", ["a1", "b2"])
    done = {
        name: httpx.get(f"{address}/stats", params={"replica": name}).json()["requests"]["stop"]
        for name in ("a1", "b2")
    }
    assert done == {"a1": 0, "b2": 0} | {home: 1}
    unknown = httpx.get(f"{address}/stats", params={"replica": "x"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "replica")
    text = httpx.get(f"{address}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counted = {
        sample.labels["replica"]: sample.value
        for sample in families["easel_requests"].samples
        if sample.labels["reason"] == "stop" and sample.name.endswith("_total")
    }
    assert counted == done
    assert text.count("# TYPE easel_queue_wait_seconds histogram") == 1
    assert {sample.labels["replica"] for sample in families["easel_queue_wait_seconds"].samples} == {"a1", "b2"}


def test_keys_and_names_are_asked_for_everywhere(build: Callable[..., Built]) -> None:
    address, _ = build(keys=Keys(["sesame"]))
    for path in ("/metrics", "/stats", "/v1/models", "/v1/responses/resp_a1_0"):
        assert httpx.get(f"{address}{path}").status_code == 401
        assert httpx.get(f"{address}{path}", headers={"x-api-key": "sesame"}).status_code in (200, 404)
    assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 401
    assert httpx.get(f"{address}/ready").status_code == 200
    address, _ = build(names=Names(frozenset()))
    for path in ("/metrics", "/v1/models"):
        assert httpx.get(f"{address}{path}", headers={"host": "evil.example"}).status_code == 403


def test_what_a_replica_refuses_comes_back_as_it_is(build: Callable[..., Built]) -> None:
    address, _ = build(max_body_bytes=1000)
    long = {"model": "demo", "messages": [{"role": "user", "content": "x" * 5000}]}
    assert httpx.post(f"{address}/v1/chat/completions", json=long).json()["error"]["code"] == "request_too_large"
    pieces = (piece.encode() for piece in ["[", *["1," * 100] * 30])
    answer = httpx.post(f"{address}/v1/messages", content=pieces, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (413, "error")
    assert httpx.post(f"{address}/v1/chat/completions", content=b"x").status_code == 415
    assert httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 400
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.post(f"{address}/stats").status_code == 405


def test_the_page_is_there_too(build: Callable[..., Built]) -> None:
    address, _ = build()
    for path in ("/", "/stats"):
        answer = httpx.get(f"{address}{path}", headers={"accept": "text/html"})
        assert answer.headers["content-type"].startswith("text/html")
    assert httpx.get(f"{address}/").json()["models"] == ["demo"]
