"""Anthropic's messages: events that add up to the body, parts of the history, and errors in its own shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.access import Keys
from server.app import AppSettings
from tests.fakes import byte_tokenizer, script

Serve = Callable[..., Any]
PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object"}}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
USER = [{"role": "user", "content": "Hi"}]
TOKENIZER = byte_tokenizer()
REPLIES = {
    "text": (script("Hel", "lo"), {}, "end_turn"),
    "thought": (script("<|channel>thought\nhm", "m\n<channel|>Yes"), {"thinking": {"type": "adaptive"}}, "end_turn"),
    "calls": (script("See: " + CALL, CALL, stop_id=50), {"tools": [TOOL]}, "tool_use"),
    "call in between": (script("a", CALL, "b"), {"tools": [TOOL]}, "tool_use"),
    "no arguments": (script("<|tool_call>call:get_weather{}<tool_call|>"), {"tools": [TOOL]}, "tool_use"),
    "length": (script("abcdef"), {"max_tokens": 3}, "max_tokens"),
    "stop": (script("one t", "wo three"), {"stop_sequences": ["two"]}, "stop_sequence"),
    "nothing": (script(""), {}, "end_turn"),
}


def ask(client: Any, path: str = PATH, **fields: Any) -> Any:
    body = {"model": "demo", "max_tokens": 500, "messages": USER, **fields}
    return client.request("POST", path, json={key: value for key, value in body.items() if value is not None})


def events(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line]
    payloads = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [f"event: {each['type']}" for each in payloads] == lines[::2]
    return payloads


def prompt(client: Any, index: int = -1) -> str:
    return str(TOKENIZER.decode(list(client.engine.requests[index].prompt_ids), skip_special_tokens=False))


def add_up(got: list[Any]) -> dict[str, Any]:
    """A message from its events, checking that they come in an order a client can follow."""
    assert (got[0]["type"], got[-2]["type"], got[-1]["type"]) == ("message_start", "message_delta", "message_stop")
    message = dict(got[0]["message"])
    assert (message["type"], message["role"], message["content"]) == ("message", "assistant", [])
    content: list[Any] = []
    partial = ""
    is_open = False
    for event in got[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(content)
            content.append(dict(event["content_block"]))
            partial, is_open = "", True
            continue
        assert is_open
        assert event["index"] == len(content) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = json.loads(partial)
            continue
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            partial += delta["partial_json"]
        else:
            key = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}[delta["type"]]
            content[-1][key] += delta[key]
    assert not is_open
    return {**message, "content": content, **got[-2]["delta"], "usage": got[-2]["usage"]}


def stable(message: Any) -> Any:
    content = [{key: value for key, value in part.items() if key != "id"} for part in message["content"]]
    return {key: value for key, value in message.items() if key not in ("id", "easel")} | {"content": content}


@pytest.mark.parametrize("name", REPLIES)
def test_the_events_add_up_to_the_body(serve: Serve, name: str) -> None:
    said, fields, reason = REPLIES[name]
    client = serve(said)
    body = ask(client, **fields).json()
    streamed = add_up(events(ask(client, **fields, stream=True)))
    assert stable(streamed) == stable(body)
    assert body["stop_reason"] == reason
    assert body["stop_sequence"] == ("two" if name == "stop" else None)
    assert {type(part.get("id")) for part in body["content"] if part["type"] == "tool_use"} <= {str}
    assert body["usage"]["input_tokens"] == len(client.engine.requests[0].prompt_ids)


def test_parts_of_a_reply(serve: Serve) -> None:
    client = serve(script("<|channel>thought\nhm\n<channel|>See: " + CALL))
    thought, text, call = ask(client, tools=[TOOL]).json()["content"]
    assert (thought["thinking"], bool(thought["signature"])) == ("hm", True)
    assert text == {"type": "text", "text": "See: "}
    assert (call["name"], call["input"], call["id"][:6]) == ("get_weather", {"city": "Paris"}, "toolu_")


def test_the_history_is_rendered_as_the_same_chat_would_be(serve: Serve) -> None:
    client = serve(script("x"))
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "See."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no city", "is_error": True},
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t9"}]},
    ]
    chat = [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "See.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
                {"id": "t2", "function": {"name": "get_weather", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no city"},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "Done."},
        {"role": "tool", "tool_call_id": "t9", "content": ""},
    ]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]
    assert ask(client, messages=history, system=system, tools=[TOOL]).status_code == 200
    function = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}}
    client.chat(messages=chat, tools=[{"type": "function", "function": function}])
    assert prompt(client, 0) == prompt(client, 1)


def test_the_beginning_of_a_reply_is_refused(serve: Serve) -> None:
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    answer = ask(serve(script("x")), messages=begun)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "must end with the user's" in answer.json()["error"]["message"]


def test_count_tokens_is_what_a_message_would_be_charged(serve: Serve) -> None:
    client = serve(script("x"))
    fields = {"system": "Be kind.", "tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    counted = ask(client, COUNT, **fields, max_tokens=None).json()
    assert counted == {"input_tokens": ask(client, **fields).json()["usage"]["input_tokens"]}
    assert ask(client, COUNT, model="other").status_code == 404


def test_options_reach_the_engine(serve: Serve) -> None:
    client = serve(script("x"))
    ask(client, temperature=0.3, top_k=5, top_p=0.9, max_tokens=7, thinking={"type": "enabled", "budget_tokens": 1})
    request = client.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.3, 5, 0.9)
    assert request.max_tokens == 7
    assert "<|think|>" in prompt(client)
    ask(client, thinking={"type": "disabled"}, tools=[TOOL], tool_choice={"type": "none"})
    assert "<|think|>" not in prompt(client)
    assert "declaration" not in prompt(client)


def test_one_call_where_parallel_ones_are_off(serve: Serve) -> None:
    client = serve(script(CALL + CALL))
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(client, tools=[TOOL], tool_choice=choice).json()["content"]) == 1


def test_what_agents_send_unasked(serve: Serve) -> None:
    answer = ask(
        serve(script("x")),
        metadata={"user_id": "u"},
        service_tier="auto",
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
        mcp_servers=[],
        tools=[],
        system=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        stream=False,
    )
    assert answer.status_code == 200


def error(answer: Any, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert (set(body), body["type"], set(body["error"])) == ({"type", "error"}, "error", {"type", "message"})
    assert body["error"]["type"] == kind
    return str(body["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "of type base64"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [{**TOOL, "input_schema": {"not": {}}, "strict": True}]}, "'not'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_what_is_refused(serve: Serve, fields: dict[str, Any], named: str) -> None:
    body = {"max_tokens": 5, "messages": USER, **fields}
    if body["max_tokens"] is None:
        del body["max_tokens"]
    answer = serve(script("x")).request("POST", PATH, json=body)
    assert named in error(answer, 400, "invalid_request_error")


def test_errors_have_anthropics_shape(serve: Serve) -> None:
    client = serve(script("a", reason="error", error="it broke"), context_length=100)
    error(ask(client, model="other"), 404, "not_found_error")
    error(client.request("GET", PATH), 405, "invalid_request_error")
    error(client.request("GET", f"{PATH}/batches"), 404, "not_found_error")
    error(client.request("POST", PATH, content="{", headers={"content-type": "application/json"}), 400,
          "invalid_request_error")  # fmt: skip
    assert "it broke" in error(ask(client), 500, "api_error")
    *_, last = events(ask(client, stream=True))
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "maximum context length" in error(
        ask(client, messages=[{"role": "user", "content": "x" * 200}]), 400, "invalid_request_error"
    )
    busy = serve(script("a"), max_waiting=-1)
    error(ask(busy), 429, "rate_limit_error")


def test_both_ways_to_send_the_key(serve: Serve) -> None:
    client = serve(script("x"), settings=AppSettings(keys=Keys(["k"])))
    body = {"max_tokens": 5, "messages": USER}
    for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
        assert client.request("POST", PATH, json=body, headers=headers).status_code == 200
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong", "x-api-key": "k"}):
        error(client.request("POST", PATH, json=body, headers=headers), 401, "authentication_error")
