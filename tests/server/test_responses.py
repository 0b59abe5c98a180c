"""Responses: the order and numbers of events, items in and out, and what goes on from an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.dialects.response_store import ResponseStore, Stored
from tests.fakes import byte_tokenizer, script

Serve = Callable[..., Any]
PATH = "/v1/responses"
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": None}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
TOKENIZER = byte_tokenizer()
REPLIES = {
    "text": (script("Hel", "lo"), {}),
    "thought": (script("<|channel>thought\nhm", "m\n<channel|>Yes", "!"), {"reasoning": {"effort": "low"}}),
    "calls": (script("See: " + CALL, CALL, stop_id=50), {"tools": [TOOL]}),
    "call in between": (script("a", CALL, "b"), {"tools": [TOOL]}),
    "length": (script("abcdef"), {"max_output_tokens": 3}),
    "nothing": (script(""), {}),
}


def ask(client: Any, given: Any = "Hi", **fields: Any) -> Any:
    return client.request("POST", PATH, json={"input": given, **fields})


def events(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line]
    assert lines.pop() == "data: [DONE]"
    payloads = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [f"event: {each['type']}" for each in payloads] == lines[::2]
    return payloads


def prompt(client: Any, index: int = -1) -> str:
    return str(TOKENIZER.decode(list(client.engine.requests[index].prompt_ids), skip_special_tokens=False))


def stable(value: Any) -> Any:
    """Without what differs between two runs of the same request."""
    if isinstance(value, dict):
        volatile = ("id", "call_id", "created_at", "completed_at", "easel")
        return {key: stable(each) for key, each in value.items() if key not in volatile}
    return [stable(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", REPLIES)
def test_the_last_event_carries_the_body(serve: Serve, name: str) -> None:
    said, fields = REPLIES[name]
    client = serve(said)
    body = ask(client, **fields).json()
    last = events(ask(client, **fields, stream=True))[-1]
    assert last["type"] == ("response.incomplete" if name == "length" else "response.completed")
    assert stable(last["response"]) == stable(body)


@pytest.mark.parametrize("name", REPLIES)
def test_every_item_is_announced_filled_and_closed_in_order(serve: Serve, name: str) -> None:
    said, fields = REPLIES[name]
    got = events(ask(serve(said), **fields, stream=True))
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    assert [event["type"] for event in got[:2]] == ["response.created", "response.in_progress"]
    assert len({event["response"]["id"] for event in got if "response" in event}) == 1
    output = got[-1]["response"]["output"]
    open_item: Any = None
    text = ""
    closed = []
    for event in got[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None
            open_item, text = event["item"], ""
            assert (event["output_index"], open_item["status"]) == (len(closed), "in_progress")
            continue
        assert event["output_index"] == len(closed)
        if kind.endswith(".delta"):
            text += event["delta"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == open_item["id"]
            closed.append(event["item"])
            open_item = None
        else:
            assert event["item_id"] == open_item["id"]
            if kind.endswith("_text.done"):
                assert event["text"] == text
            elif kind == "function_call_arguments.done":
                assert event["arguments"] == text
    assert open_item is None
    assert closed == output


def test_items_of_a_reply(serve: Serve) -> None:
    said = script("<|channel>thought\nhm\n<channel|>See: " + CALL + CALL)
    body = ask(serve(said), tools=[TOOL]).json()
    thought, message, *calls = body["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (message["role"], message["content"][0]["text"]) == ("assistant", "See: ")
    assert [call["arguments"] for call in calls] == ['{"city": "Paris"}'] * 2
    assert all(call["call_id"].startswith("call_") for call in calls)
    assert len({item["id"] for item in body["output"]}) == 4
    assert body["id"].startswith("resp_")


def test_a_cut_reply_is_incomplete(serve: Serve) -> None:
    body = ask(serve(script("abcdef")), max_output_tokens=3).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


def test_an_engine_that_gives_up(serve: Serve) -> None:
    client = serve(script("a", reason="error", error="it broke"))
    *_, failed, error = events(ask(client, stream=True))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert "it broke" in failed["response"]["error"]["message"]
    assert (error["type"], error["sequence_number"]) == ("error", failed["sequence_number"] + 1)
    assert error["message"] == error["error"]["message"]
    assert client.request("GET", f"{PATH}/{failed['response']['id']}").status_code == 404
    assert "it broke" in ask(client).json()["error"]["message"]


def test_the_input_is_rendered_as_the_same_chat_would_be(serve: Serve) -> None:
    client = serve(script("x"))
    items = [
        {"role": "developer", "content": "Short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "See."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    messages = [
        {"role": "developer", "content": "Short."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "See.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
                {"id": "c2", "function": {"name": "get_weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    chat_tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    assert ask(client, items, tools=[TOOL], instructions="Be kind.").status_code == 200
    client.chat(messages=[{"role": "system", "content": "Be kind."}, *messages], tools=[chat_tool])
    assert prompt(client, 0) == prompt(client, 1)


def test_a_response_goes_on_from_an_earlier_one(serve: Serve) -> None:
    client = serve(script("<|channel>thought\nhm\n<channel|>" + CALL), script("It is sunny."), script("Yes."))
    first = ask(client, "Weather?", tools=[TOOL], instructions="Once only.").json()
    result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "sunny"}
    second = ask(client, [result], tools=[TOOL], previous_response_id=first["id"]).json()
    assert second["previous_response_id"] == first["id"]
    assert "Weather?" in prompt(client)
    assert 'response:get_weather{value:<|"|>sunny<|"|>}' in prompt(client)
    assert "Once only." not in prompt(client)
    ask(client, "Sure?", previous_response_id=second["id"])
    assert "It is sunny.<turn|>\n<|turn>user\nSure?" in prompt(client)
    # the earlier ones are unchanged: a second branch starts where the first did
    ask(client, "Other", previous_response_id=first["id"])
    assert "sunny" not in prompt(client)


def test_kept_responses_can_be_read_and_forgotten(serve: Serve) -> None:
    client = serve(script("Hello"))
    body = ask(client).json()
    streamed = events(ask(client, stream=True))[-1]["response"]
    for response in (body, streamed):
        where = f"{PATH}/{response['id']}"
        assert client.request("GET", where).json() == response
        assert client.request("DELETE", where).json() == {"id": response["id"], "object": "response", "deleted": True}
        assert client.request("GET", where).status_code == 404
        assert client.request("DELETE", where).status_code == 404
        error = ask(client, previous_response_id=response["id"]).json()["error"]
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


def test_what_is_not_to_be_stored_is_not(serve: Serve) -> None:
    client = serve(script("Hello"))
    body = ask(client, store=False).json()
    assert body["store"] is False
    assert client.request("GET", f"{PATH}/{body['id']}").status_code == 404


def test_the_store_forgets_the_oldest_first() -> None:
    def stored(name: str, text: str = "") -> Stored:
        return Stored({"id": name}, ({"content": text},))

    store = ResponseStore(most=3)
    for name in "abc":
        store.put(stored(name))
    assert store.get("a")
    store.put(stored("d"))
    assert [bool(store.get(name)) for name in "abcd"] == [True, False, True, True]
    small = ResponseStore(most_characters=1000)
    for name in "abcdef":
        small.put(stored(name, "x" * 400))
    assert len(small) == 2
    small.put(stored("huge", "x" * 2000))
    assert len(small) == 0
    small.put(stored("a"))
    assert small.delete("a")
    assert not small.delete("a")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"given": None}, "input"),
        ({"given": []}, "input"),
        ({"given": [5]}, "input[0]"),
        ({"given": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"given": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]"),
        ({"given": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"given": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"given": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{**TOOL, "parameters": {"not": {}}, "strict": True}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ],
)
def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    answer = ask(serve(script("x")), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_clients_send_unasked(serve: Serve) -> None:
    answer = ask(
        serve(script("x")),
        stream=False,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "medium", "summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "low"},
        tools=[],
        tool_choice="auto",
        truncation="disabled",
        service_tier="auto",
        store=True,
        metadata={},
        prompt_cache_key="k",
        safety_identifier="s",
        user="me",
        background=False,
        top_logprobs=0,
        stream_options={"include_obfuscation": False},
        max_tool_calls=None,
        parallel_tool_calls=False,
    )
    assert answer.status_code == 200
    assert answer.json()["parallel_tool_calls"] is False


def test_options_reach_the_engine(serve: Serve) -> None:
    client = serve(script("x"))
    ask(client, temperature=0.5, top_p=0.9, seed=-1, max_output_tokens=7, reasoning={"effort": "low"})
    request = client.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (0.5, 0.9, 2**64 - 1)
    assert request.max_tokens == 7
    assert "<|think|>" in prompt(client)
