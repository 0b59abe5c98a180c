"""The scenarios of Open Responses' compliance suite, by the names it gives them, after its published specification.

Its own runner comes with its repository only, in no package, so the requests and what an answer must hold are written
here again. One differs: images are not read yet, and that must be said clearly.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

Json = dict[str, Any]
Ask = Callable[..., Any]

NULL = type(None)
NUMBER = (int, float)
# The members that a response always has, and their types.
RESPONSE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "object", "status", "model", "truncation", "service_tier"), (str,)),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), (bool,)),
    **dict.fromkeys(("top_p", "temperature", "presence_penalty", "frequency_penalty"), NUMBER),
    **dict.fromkeys(("instructions", "previous_response_id", "user", "safety_identifier"), (str, NULL)),
    **dict.fromkeys(("completed_at", "max_output_tokens", "max_tool_calls"), (int, NULL)),
    **dict.fromkeys(("incomplete_details", "error", "reasoning", "usage"), (dict, NULL)),
    **dict.fromkeys(("output", "tools"), (list,)),
    **dict.fromkeys(("text", "metadata"), (dict,)),
    "created_at": (int,),
    "prompt_cache_key": (str, NULL),
    "tool_choice": (str, dict),
    "top_logprobs": (int,),
}
ITEMS = {
    "message": {"id", "status", "role", "content"},
    "function_call": {"id", "status", "call_id", "name", "arguments"},
    "reasoning": {"id", "summary", "content"},
}
PART = {"type", "text", "annotations", "logprobs"}
TOOL = {"type", "name", "description", "parameters", "strict"}
USAGE = {"input_tokens", "output_tokens", "total_tokens", "input_tokens_details", "output_tokens_details"}
EVENTS = {  # beside `type` and `sequence_number`
    "response.created": {"response"},
    "response.in_progress": {"response"},
    "response.completed": {"response"},
    "response.output_item.added": {"output_index", "item"},
    "response.output_item.done": {"output_index", "item"},
    "response.content_part.added": {"item_id", "output_index", "content_index", "part"},
    "response.content_part.done": {"item_id", "output_index", "content_index", "part"},
    "response.output_text.delta": {"item_id", "output_index", "content_index", "delta", "logprobs"},
    "response.output_text.done": {"item_id", "output_index", "content_index", "text", "logprobs"},
    "response.function_call_arguments.delta": {"item_id", "output_index", "delta"},
    "response.function_call_arguments.done": {"item_id", "output_index", "arguments"},
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state"}},
        "required": ["location"],
    },
}


@pytest.fixture
def ask(address: str) -> Ask:
    """The text of an answer to these messages."""

    def post(*messages: Json, **fields: Any) -> str:
        items = [{"type": "message", **message} for message in messages]
        body = json.dumps({"model": "easel-demo", "input": items, **fields}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/responses", body, headers)) as answer:
            return str(answer.read().decode())

    return post


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def check(response: Json, status: str = "completed") -> None:
    """Whether a response has all that one must have."""
    wrong = {name: response.get(name, "missing") for name, types in RESPONSE.items() if not has(response, name, types)}
    assert not wrong
    assert (response["object"], response["status"]) == ("response", status)
    for item in response["output"]:
        assert ITEMS[item["type"]] <= item.keys()
        if item["type"] == "message":
            assert all(part.keys() >= PART for part in item["content"])
    assert all(tool.keys() >= TOOL for tool in response["tools"])
    if status == "completed":
        assert response["output"]
        assert response["usage"].keys() >= USAGE


def has(response: Json, name: str, types: tuple[type, ...]) -> bool:
    """Whether a member is there with a type that it may have; True is no number."""
    value = response.get(name, ...)
    return isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


def events(stream: str) -> list[Json]:
    """The events of a stream, each as it must be, and the response at its end."""
    *blocks, end = stream.replace("\r\n", "\n").strip().split("\n\n")
    assert end == "data: [DONE]"
    found = []
    for block in [block for block in blocks if not block.startswith(":")]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event.keys() >= EVENTS[event["type"]]
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert (found[0]["type"], found[-1]["type"]) == ("response.created", "response.completed")
    check(found[0]["response"], "in_progress")
    check(found[-1]["response"])
    return found


def test_basic_response(ask: Ask) -> None:
    check(json.loads(ask(user("Say hello in exactly 3 words."))))


def test_streaming_response(ask: Ask) -> None:
    found = events(ask(user("Count from 1 to 5."), stream=True))
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == found[-1]["response"]["output"][0]["content"][0]["text"] == "It is sunny."


def test_system_prompt(ask: Ask) -> None:
    check(json.loads(ask({"role": "system", "content": "You are a pirate."}, user("Say hello."))))


def test_tool_calling(ask: Ask) -> None:
    response = json.loads(ask(user("What's the weather like in San Francisco?"), tools=[WEATHER]))
    check(response)
    assert response["output"][-1]["type"] == "function_call"


def test_tool_calling_streaming(ask: Ask) -> None:
    found = events(ask(user("What's the weather like in San Francisco?"), tools=[WEATHER], stream=True))
    added, *deltas, done, item = [
        event
        for event in found
        if event.get("item", {}).get("type") == "function_call" or "function_call_arguments" in event["type"]
    ]
    assert (added["type"], item["type"]) == ("response.output_item.added", "response.output_item.done")
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert "".join(delta["delta"] for delta in deltas) == done["arguments"] == item["item"]["arguments"]


def test_image_input(ask: Ask) -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask({"role": "user", "content": [{"type": "input_text", "text": "What is this?"}, picture]})
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["param"]) == (400, "input[0].content[1]")
    assert "takes no images" in error["message"]


def test_multi_turn(ask: Ask) -> None:
    answer = {"role": "assistant", "content": "Hello Alice! Nice to meet you."}
    check(json.loads(ask(user("My name is Alice."), answer, user("What is my name?"))))
