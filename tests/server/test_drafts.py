"""Drafts of canvases on their way to whoever asked: the wire, the bridge, the terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from engine import CanvasDone, CanvasDraft, Finished, GenerationRequest, Sampling
from server.bridge import Bridge
from server.terminal_chat import ChatClient, ReplyView, TerminalChat
from server.terminal_chat import Draft as ShownDraft
from tests.fakes import FakeEngine, Script, script

WATCHED = {"stream": True, "easel": {"drafts": True}}


def parts(text: str) -> list[tuple[str | None, Any]]:
    """(name, payload) of every event."""
    found: list[tuple[str | None, Any]] = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line)
        if lines.get("data", "[DONE]") != "[DONE]":
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def test_drafts_are_events_of_their_own_name_between_the_chunks(serve: Callable[..., Any]) -> None:
    found = parts(serve(script("Hello", " you")).chat(**WATCHED).text)
    drafts = [payload for name, payload in found if name == "easel.draft"]
    assert {name for name, _ in found} == {None, "easel.draft"}
    assert all(payload["object"] == "easel.draft" and payload["choices"] == [] for payload in drafts)
    drafts = [payload["draft"] for payload in drafts]
    places = [(draft["canvas"], draft["step"]) for draft in drafts]
    assert places == sorted(set(places))  # each step at most once
    assert places[-1] == (1, 3)  # nothing comes after it in whose favour it could be dropped
    for draft in drafts:
        assert len(draft["tokens"]) == len(draft["entropy"]) == 64
        assert draft["accepted"] == list(range(64 * draft["step"] // 3))
    assert "".join(text for text in drafts[-1]["tokens"] if text is not None) == " you"
    assert None in drafts[-1]["tokens"]  # the end of the reply and what fills the canvas behind it


def test_who_does_not_ask_sees_what_there_always_was(serve: Callable[..., Any]) -> None:
    client = serve(script("Hello", " you"))
    watched = [payload for name, payload in parts(client.chat(**WATCHED, seed=1).text) if name is None]
    plain = client.chat(stream=True, seed=1, easel={"preset": "fast"}).text
    assert "easel.draft" not in plain
    assert [payload["choices"] for payload in watched] == [payload["choices"] for _, payload in parts(plain)]
    assert [request.drafts for request in client.engine.requests] == [True, False]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "easel": {"drafts": True}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "easel": {"drafts": 1}}),
        ("/v1/completions", {"prompt": "x", **WATCHED}),
        ("/v1/responses", {"input": "x", **WATCHED}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, **WATCHED}),
    ],
)
def test_where_there_are_none_they_are_refused_by_name(serve: Callable[..., Any], path: str, fields: Any) -> None:
    answer = serve(script("a")).request("POST", path, json={"model": "demo", **fields})
    assert answer.status_code == 400
    assert "drafts" in answer.json()["error"]["message"]


def test_a_slow_reader_finds_only_the_latest_draft() -> None:
    said = Script([[120] * 3, [121] * 3], steps=20)
    wanted = GenerationRequest(id="r", prompt_ids=(7,), max_tokens=99, sampling=Sampling(seed=0), drafts=True)

    async def run() -> list[Any]:
        async with bridge.generate(wanted) as events:
            while not events.finished:  # type: ignore[attr-defined]  # all is there before anything is read
                await asyncio.sleep(0.001)
            return [event async for event in events]

    with Bridge(FakeEngine([said])) as bridge:
        events = asyncio.run(run())
    assert [type(event) for event in events] == [CanvasDone, CanvasDraft, CanvasDone, Finished]
    assert (events[1].index, events[1].step) == (1, 20)


def test_the_terminal_shows_the_canvas(serve: Callable[..., Any], listening: Callable[[Any], Any]) -> None:
    lines = iter(["Hi"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=60, highlight=False)
    with listening(serve(script("Hello you", step_seconds=0.02)).app) as address:
        client = ChatClient(address)
        TerminalChat(client, console, model="demo", watch=True).run(read)
        client.close()
    assert "▓" in screen.getvalue()
    assert "Hello you" in screen.getvalue().rpartition("▓")[2]


def test_a_canvas_in_the_terminal_steers_nothing_and_stays_small() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=20, highlight=False)
    with ReplyView(console) as view:
        view.watch(ShownDraft(["\x07bell", None, "\n" * 50, "x"], [0.0, 0.5, 2.0, 9.0], [0, 2]))
    assert "\x07" not in screen.getvalue()
    assert "bell" in screen.getvalue()
    assert screen.getvalue().count("\n") < 60
