"""server.call_memory: a call that comes back as JSON becomes the ids the model wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from server.call_memory import CallMemory, CallSpans
from tests.fakes import byte_tokenizer, script

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
WRITTEN = '<|tool_call>call:f{ b: <|"|>x<|"|>, a: 7 }<tool_call|>'  # odd spaces and order


def call(arguments: Any, call_id: str = "c1", name: str = "f") -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": name, "arguments": arguments}}]}


def test_a_call_is_known_by_id_name_and_arguments() -> None:
    memory = CallMemory()
    memory.remember("c1", "f", '{"b": "x", "a": [1, {"c": null}]}', (7, 8))
    same = {"a": [1, {"c": None}], "b": "x"}
    assert memory.recall([call(same)]) == [(7, 8)]
    assert memory.recall([{"role": "user", "content": "hi"}, call(same), call(same)]) == [(7, 8), (7, 8)]
    for changed in (call({**same, "b": "y"}), call(same, call_id="c2"), call(same, name="g"), call({})):
        assert memory.recall([changed]) == [None]


def test_the_call_used_longest_ago_is_dropped() -> None:
    memory = CallMemory(most_ids=5)
    memory.remember("a", "f", "{}", (1, 2))
    memory.remember("b", "f", "{}", (3, 4))
    memory.recall([call({}, "a")])
    memory.remember("c", "f", "{}", (5, 6))
    assert memory.recall([call({}, name) for name in "abc"]) == [(1, 2), None, (5, 6)]
    memory.remember("c", "f", "{}", (5, 6, 7))
    assert memory.recall([call({}, name) for name in "ac"]) == [(1, 2), (5, 6, 7)]
    memory.remember("d", "f", "{}", (9,) * 6)
    assert memory.recall([call({}, name) for name in "abcd"]) == [None] * 4, "larger than all there may be"


def spans(*tokens: tuple[int, int]) -> dict[int, tuple[int, ...]]:
    subject = CallSpans(48, 49)
    for token_id, calls in tokens:
        subject.push(token_id, calls)
    return subject.found


def test_spans_are_those_that_came_to_one_call() -> None:
    assert spans((1, 0), (48, 0), (5, 0), (6, 0), (49, 1), (2, 1)) == {0: (5, 6)}
    assert spans((48, 0), (5, 0), (49, 1), (48, 1), (6, 1), (49, 2)) == {0: (5,), 1: (6,)}
    assert spans((48, 0), (5, 0), (49, 2)) == {}, "two calls between one pair"
    assert spans((48, 0), (5, 0), (49, 0), (48, 0), (6, 0), (49, 1)) == {0: (6,)}, "the first was no call"
    assert spans((48, 0), (5, 0), (48, 1), (6, 1), (49, 2)) == {1: (6,)}, "the first lacked its closer"
    assert spans((48, 0), (5, 0)) == spans((49, 0), (5, 1)) == {}


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("edited", [False, True])
def test_a_tool_loop_renders_what_was_written(serve: Any, edited: bool) -> None:
    """Through HTTP: the second prompt holds the very ids of the first reply, unless the client changed the call."""
    client = serve(script(WRITTEN, stop_id=50), script("done"))
    first = client.chat("go", tools=[TOOL]).json()["choices"][0]["message"]
    (made,) = first["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"a": 7, "b": "x"}
    if edited:
        made["function"]["arguments"] = '{"a": 8, "b": "x"}'
    history = [{"role": "user", "content": "go"}, first, {"role": "tool", "tool_call_id": made["id"], "content": "5"}]
    answer = client.request("POST", "/v1/chat/completions", json={"messages": history, "tools": [TOOL]})
    assert answer.status_code == 200
    one, two = (request.prompt_ids for request in client.engine.requests)
    expected = '<|tool_call>call:f{a:8,b:<|"|>x<|"|>}<tool_call|>' if edited else WRITTEN
    assert two[: len(one) + len(ids(expected)) + 1] == (*one, *ids(expected), 50)


def test_two_prompts_count_their_cached_tokens_once_each(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(script("ok"))
    finish = type(client.engine)._finish

    def with_cached(self: Any, running: Any, reason: Any) -> Any:
        done = finish(self, running, reason)
        return replace(done, usage=replace(done.usage, cached_tokens=3))

    monkeypatch.setattr(type(client.engine), "_finish", with_cached)
    answer = client.request("POST", "/v1/completions", json={"model": "demo", "prompt": ["ab cd", "ef"], "n": 2})
    assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
