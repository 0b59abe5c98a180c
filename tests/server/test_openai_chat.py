"""The wire format: OpenAI's rules for bodies and chunks (api.md 2.1 to 2.3), and what goes to the template."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.dialects.chat_schema import parse_chat_request
from server.dialects.openai_chat import to_task
from server.errors import ApiError
from tests.fakes import script

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
REPLIES = {
    "content": (script("Hel", "lo"), {}),
    "reasoning": (script("<|channel>thought\nhm", "m\n<channel|>Yes", "!"), {"reasoning_effort": "low"}),
    "call": (script("See: " + CALL + CALL, stop_id=50), {"tools": [TOOL]}),
    "call without arguments": (script("<|tool_call>call:get_weather{}<tool_call|>"), {"tools": [TOOL]}),
    "call across canvases": (script(CALL[:10], CALL[10:30], CALL[30:]), {"tools": [TOOL]}),
    "length": (script("abcdef"), {"max_tokens": 3}),
    "stop": (script("one t", "wo three"), {"stop": "two"}),  # nothing left to cancel: counts are exact
    "nothing": (script(""), {}),
    "choices": (script("a", "b"), {"n": 3}),
    "odd text": (script('"\\\n\r\t\x00\u2028é漢🙂</script>'), {}),
}


def events(text: str) -> list[Any]:
    """The payloads of an event stream; everything else in it must be a comment or an empty line."""
    payloads = []
    for line in text.split("\n"):
        if line.startswith("data: "):
            payloads.append(line.removeprefix("data: "))
        else:
            assert line == "" or line.startswith(":"), line
    assert payloads.pop() == "[DONE]"
    return [json.loads(payload) for payload in payloads]


@pytest.fixture(params=REPLIES)
def both(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> tuple[Any, list[Any], list[Any]]:
    """One reply as a body, as chunks, and as chunks with usage."""
    said, fields = REPLIES[request.param]
    client = serve(said)
    body = client.chat(seed=1, **fields)
    plain = client.chat(seed=1, stream=True, **fields)
    with_usage = client.chat(seed=1, stream=True, stream_options={"include_usage": True}, **fields)
    assert {answer.status_code for answer in (body, plain, with_usage)} == {200}
    return body.json(), events(plain.text), events(with_usage.text)


def add_up(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        total = choices.setdefault(
            choice["index"], {"content": "", "reasoning_content": "", "calls": {}, "finish": None}
        )
        delta = choice["delta"]
        for key in ("content", "reasoning_content"):
            total[key] += delta.get(key) or ""
        for call in delta.get("tool_calls", []):
            assert call["index"] not in total["calls"], "id and name are sent once"
            total["calls"][call["index"]] = call["function"]
        total["finish"] = choice["finish_reason"] or total["finish"]
    return choices


def test_the_chunks_add_up_to_the_body(both: Any) -> None:
    body, *streams = both
    for chunks in streams:
        totals = add_up(chunks)
        assert sorted(totals) == [choice["index"] for choice in body["choices"]]
        for choice in body["choices"]:
            total, message = totals[choice["index"]], choice["message"]
            assert total["content"] == (message["content"] or "")
            assert total["reasoning_content"] == message.get("reasoning_content", "")
            assert list(total["calls"].values()) == [call["function"] for call in message.get("tool_calls", [])]
            assert total["finish"] == choice["finish_reason"]


def test_chunk_rules(both: Any) -> None:
    _, *streams = both
    for chunks in streams:
        assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert chunks[0]["choices"][0]["index"] == 0
        finished: set[int] = set()
        opened: set[int] = set()
        for chunk in chunks:
            for choice in chunk["choices"]:
                assert choice["logprobs"] is None
                index, delta = choice["index"], choice["delta"]
                assert index not in finished
                if index not in opened:
                    assert delta == {"role": "assistant", "content": ""}
                    opened.add(index)
                else:
                    assert "role" not in delta
                if choice["finish_reason"]:
                    assert delta == {}
                    finished.add(index)
                elif "role" not in delta:
                    assert delta
                assert all(isinstance(delta.get(key, ""), str) for key in ("content", "reasoning_content"))
        assert finished == opened


def test_the_usage_chunk_comes_last_and_only_when_asked_for(both: Any) -> None:
    body, plain, with_usage = both
    assert all("usage" not in chunk for chunk in plain)
    *others, last = with_usage
    assert all("usage" not in chunk for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == body["usage"]
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}
    assert set(usage["completion_tokens_details"]) == {"reasoning_tokens"}


def test_the_last_chunk_carries_the_vendor_field(both: Any) -> None:
    body, *streams = both
    for chunks in streams:
        assert [("easel" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        facts = chunks[-1]["easel"]
        assert set(facts) == set(body["easel"])
        assert (facts["seed"], facts["canvases"], facts["steps"]) == (
            1,
            body["easel"]["canvases"],
            body["easel"]["steps"],
        )
        assert facts["tokens_per_forward"] == body["easel"]["tokens_per_forward"]


def test_the_body(both: Any) -> None:
    body, *_ = both
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    for choice in body["choices"]:
        assert choice["logprobs"] is None
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["refusal"] is None
        assert "reasoning" not in (choice["message"]["content"] or "")


def test_one_chunk_per_canvas(serve: Callable[..., Any]) -> None:
    chunks = events(serve(script("a", "b", "c")).chat(stream=True).text)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a", "b", "c", None]


def test_a_canvas_with_everything_in_it_is_one_chunk(serve: Callable[..., Any]) -> None:
    client = serve(script("<|channel>thought\nhm\n<channel|>Yes" + CALL))
    chunks = events(client.chat(stream=True, tools=[TOOL]).text)
    assert len(chunks) == 3
    delta = chunks[1]["choices"][0]["delta"]
    assert (delta["reasoning_content"], delta["content"]) == ("hm", "Yes")
    (call,) = delta["tool_calls"]
    assert (call["index"], call["type"]) == (0, "function")
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_calls_in_a_body(serve: Callable[..., Any]) -> None:
    body = serve(script(CALL + CALL)).chat(tools=[TOOL]).json()
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert [call["type"] for call in message["tool_calls"]] == ["function", "function"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert "index" not in message["tool_calls"][0]
    assert body["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_choice_none_hides_the_tools(serve: Callable[..., Any]) -> None:
    client = serve(script("plain"))
    client.chat(tools=[TOOL], tool_choice="none")
    client.chat(tools=[TOOL], tool_choice="auto")
    without, with_tools = client.engine.requests
    assert len(without.prompt_ids) < len(with_tools.prompt_ids)


def test_choices_are_interleaved_as_they_come(serve: Callable[..., Any]) -> None:
    chunks = events(serve(script("a", "b")).chat(stream=True, n=2).text)
    assert [chunk["choices"][0]["index"] for chunk in chunks][:2] == [0, 1]
    assert sorted({chunk["choices"][0]["index"] for chunk in chunks}) == [0, 1]


def test_an_error_in_the_middle_is_an_error_event_then_done(serve: Callable[..., Any]) -> None:
    client = serve(script("a", reason="error", error="non-finite logits"))
    *chunks, last = events(client.chat(stream=True).text)
    assert chunks[1]["choices"][0]["delta"] == {"content": "a"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "non-finite logits" in last["error"]["message"]


def test_unicode_line_ends_are_escaped_on_the_wire(serve: Callable[..., Any]) -> None:
    text = serve(script("a\u2028b\u2029c\u0085d")).chat(stream=True).text
    assert not {"\u2028", "\u2029", "\u0085", "\r"} & set(text)
    assert events(text)[1]["choices"][0]["delta"]["content"] == "a\u2028b\u2029c\u0085d"


def task(**fields: Any) -> Any:
    return to_task(parse_chat_request(json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode()))


def test_messages_are_made_ready_for_a_template() -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages = task(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call('{"x": 1}')], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}], "name": "other"},
            {"role": "tool", "tool_call_id": "c2", "content": "lost"},
            {"role": "tool", "tool_call_id": "c2", "content": {"degrees": 7}, "name": "named"},
        ]
    ).messages
    assert [message["content"] for message in messages] == ["a\nb", "", "sunny", "lost", '{"degrees": 7}']
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert messages[1]["reasoning_content"] == "hm"
    assert [message["name"] for message in messages[2:]] == ["f", "unknown", "named"]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("{}", {}),
        ("", {}),
        (None, {}),
        ({"x": 1}, {"x": 1}),
        ("not json", {"value": "not json"}),
        ("[1]", {"value": [1]}),
        ("[" * 10_000, {"value": "[" * 10_000}),
    ],
)
def test_call_arguments_in_the_history_become_objects(arguments: Any, given: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = task(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"]["arguments"] == given


def test_options_of_the_request() -> None:
    assert task().template_options == {"enable_thinking": False}
    assert task(reasoning_effort="none").template_options == {"enable_thinking": False}
    assert task(reasoning_effort="high").template_options == {"enable_thinking": True}
    assert task(chat_template_kwargs={"enable_thinking": True, "x": 1}).template_options == {
        "enable_thinking": True,
        "x": 1,
    }
    explicit = task(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert explicit.template_options == {"enable_thinking": False}
    with pytest.raises(ApiError, match="enable_thinking"):
        task(chat_template_kwargs={"enable_thinking": "yes"})


def test_sampling_of_the_request() -> None:
    assert (task().temperature, task().top_p, task().top_k, task().seed) == (1.0, 1.0, 0, None)
    assert (task(top_k=-1).top_k, task(top_k=7).top_k) == (0, 7)
    assert (task(top_p=0).top_p, task(top_p=0).top_k) == (1.0, 1)
    assert task(seed=-1).seed == 2**64 - 1
    assert task(max_tokens=5, max_completion_tokens=6).max_tokens == 6
    assert task(stop=["a", "b"]).stop == ("a", "b")
    assert task(parallel_tool_calls=False).parallel_tool_calls is False
