"""Input that is too big, too deep or no sense at all: refused or served, in bounded time, and never a 500."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects import anthropic, completions, openai_chat, responses
from server.dialects.response_store import ResponseStore
from server.errors import ApiError
from server.prompt import PromptRenderer
from server.tool_schema import for_template
from tests.fakes import FakeEngine, Template, byte_tokenizer, script
from tests.server.conftest import Client

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def chat_tool(name: str = "f", schema: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema or SCHEMA}}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = FakeEngine(lambda _: script("Hello"), context_length=200_000)
    with Bridge(engine) as bridge:
        service = ChatService(bridge, PromptRenderer(byte_tokenizer(), Template()), ["demo"])
        yield Client(engine, create_app(service, AppSettings()))


def nested(depth: int, key: str = "properties") -> Any:
    node: Any = {"type": "string"}
    for _ in range(depth):
        node = {"type": "object", key: {"x": node} if key == "properties" else [node]}
    return node


BODIES: dict[str, tuple[Callable[[], dict[str, Any]], set[int]]] = {
    "a thousand tools": (lambda: {"messages": [USER], "tools": [chat_tool(f"f{n}") for n in range(1000)]}, {200}),
    "a thousand messages": (lambda: {"messages": [USER, {"role": "assistant", "content": "x"}] * 500}, {200}),
    "a message of nine megabytes": (lambda: {"messages": [{"role": "user", "content": "x" * 9_000_000}]}, {400}),
    "a body of eleven megabytes": (lambda: {"messages": [{"role": "user", "content": "x" * 11_000_000}]}, {413}),
    "a deep schema": (lambda: {"messages": [USER], "tools": [chat_tool(schema=nested(100))]}, {400}),
    "deep alternatives": (lambda: {"messages": [USER], "tools": [chat_tool(schema=nested(100, "anyOf"))]}, {400}),
    "a wide schema": (
        lambda: {
            "messages": [USER],
            "tools": [chat_tool(schema={"properties": {f"p{n}": SCHEMA for n in range(50_000)}})],
        },
        {400},
    ),
    "many parts": (
        lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 50_000}]},
        {200},
    ),
    "wrong parts without end": (lambda: {"messages": [{"role": "user", "content": [{}] * 100_000}]}, {400}),
    "deep arguments in the history": (
        lambda: {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 50_000}}]},
            ]
        },
        {200},
    ),
    "deep but valid arguments": (
        lambda: {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}],
                },
            ]
        },
        {200, 400},
    ),
    "control tokens without end": (lambda: {"messages": [{"role": "user", "content": "<|turn>" * 20_000}]}, {200}),
}


@pytest.mark.parametrize("name", BODIES)
def test_big_and_deep_requests(client: Client, name: str) -> None:
    make, statuses = BODIES[name]
    content = json.dumps({"model": "demo", **make()}).encode()
    began = time.process_time()  # what else the machine does is no matter
    answer = client.request(
        "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code in statuses, answer.text[:500]
    assert len(answer.content) < 10_000
    assert time.process_time() - began < 10  # a second or two


def test_many_choices_and_prompts_are_bounded(client: Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": ["a"] * 100_000}),
        ("/v1/completions", {"prompt": [[1]] * 100_000}),
        ("/v1/completions", {"prompt": "a", "n": 1000}),
        ("/v1/chat/completions", {"messages": [USER], "n": 1000}),
        ("/v1/chat/completions", {"messages": [USER], "stop": ["a"] * 1000}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 5, "stop_sequences": ["a"] * 1000}),
    ):
        assert client.request("POST", path, json=body).status_code == 400


PREDICATE = {"type": "predicate", "instructions": "x" * 10_000}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/infill", {"input_prefix": "a", "input_suffix": "b" * 9_000_000, "n_predict": 4}, 200),
        ("/infill", {"input_prefix": "a" * 9_000_000, "n_predict": 4}, 400),
        ("/v1/completions", {"prompt": ["a"] * 64, "suffix": "b" * 100_000, "max_tokens": 2}, 200),
        ("/v1/decisions", {"input": "a" * 9_000_000, "questions": [PREDICATE]}, 400),
        ("/v1/decisions", {"input": "a", "questions": [PREDICATE] * 400}, 200),
        ("/v1/decisions", {"input": [{"role": "user", "content": "a"}] * 50_000, "questions": [PREDICATE]}, 200),
        ("/v1/chat/completions", {"messages": [USER], "logit_bias": {str(n): 1 for n in range(100_000)}}, 400),
        ("/v1/chat/completions", {"messages": [USER], "easel": {"x" * 1000: 1}}, 400),
    ],
)
def test_what_is_new_is_bounded_too(client: Client, path: str, body: Any, status: int) -> None:
    answer = client.request("POST", path, json=body)
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.content) < 100_000


WORDS = ["user", "assistant", "tool", "text", "tool_use", "tool_result", "function", "function_call", "f"]
KEYS = (
    "role content type text name input id call_id tool_use_id arguments output function parameters input_schema "
    "summary thinking tool_calls tool_call_id format"
).split()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
FIELDS = {
    openai_chat.read: ["messages", "tools", "tool_choice", "stop", "stream_options", "seed", "response_format"],
    completions.read: ["prompt", "echo", "best_of", "n", "guided_json", "guided_choice", "structured_outputs"],
    anthropic.read: ["messages", "system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences"],
    responses.read: ["input", "tools", "tool_choice", "reasoning", "text", "include", "previous_response_id"],
}
STORE = ResponseStore()
PROMPTS = PromptRenderer(byte_tokenizer(), Template())


@pytest.mark.parametrize("read", FIELDS)
def test_any_json_is_a_request_or_a_400(read: Any) -> None:
    base: dict[str, Any] = {"messages": [USER], "prompt": "x", "input": "x", "max_tokens": 5}

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(FIELDS[read]), JSON | st.lists(JSON, max_size=3), min_size=1, max_size=3))
    def attempt(fields: dict[str, Any]) -> None:
        document = json.dumps({**base, **fields}).encode()
        try:
            asked = read(STORE, document) if read is responses.read else read(document)
            task = asked.task
            if task.messages:
                PROMPTS.render(task.messages, for_template(task.tools), task.template_options)
        except ApiError as error:
            assert error.status in (400, 404)
            json.dumps(error.body())

    attempt()
