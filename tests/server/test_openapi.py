"""Our answers against OpenAI's own description of them (`openai/description.json`, see `openai/extract.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects.chat_schema import ChatRequest
from server.dialects.completions import CompletionRequest
from server.dialects.responses_schema import ResponsesRequest
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, script

DESCRIPTION = json.loads(Path(__file__).with_name("openai").joinpath("description.json").read_text())

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (script("Hel", "lo"), {}),
    (script("<|channel>thought\nhm\n<channel|>Yes"), {"reasoning_effort": "high"}),
    (script("See " + CALL + CALL), {"tools": [TOOL]}),
    (script("abcdef"), {"max_tokens": 2}),
    (script("ab"), {"n": 3}),
    (script(""), {}),
]


@pytest.fixture
def check() -> Callable[[str, Any], None]:
    def validate(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    return validate


def payloads(stream: str) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]


def check_chunk(path: str, chunk: Any, check: Callable[[str, Any], None]) -> None:
    if path == "/chat/completions":
        check("CreateChatCompletionStreamResponse", chunk)
    elif path == "/responses":
        check("ResponseStreamEvent", chunk)
    else:
        # The description has no document for these chunks, and its finish_reason cannot be null; OpenAI's is.
        assert {choice["finish_reason"] for choice in chunk["choices"]} <= {None, "stop", "length"}
        choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
        check("CreateCompletionResponse", {**chunk, "choices": choices})


@pytest.mark.parametrize(("said", "fields"), REQUESTS)
def test_bodies_and_chunks(serve: Callable[..., Any], check: Any, said: Any, fields: dict[str, Any]) -> None:
    client = serve(said)
    check("CreateChatCompletionResponse", client.chat(**fields).json())
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = payloads(client.chat(stream=True, **options, **fields).text)
        assert len(chunks) >= 2
        for chunk in chunks:
            check("CreateChatCompletionStreamResponse", chunk)


RESPONSE_TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}
RESPONSES: list[tuple[Any, dict[str, Any]]] = [
    (script("Hel", "lo"), {}),
    (
        script("<|channel>thought\nhm", "m\n<channel|>Yes"),
        {"reasoning": {"effort": "high"}, "instructions": "Be kind."},
    ),
    (script("See " + CALL, CALL), {"tools": [RESPONSE_TOOL], "metadata": {"a": "b"}}),
    (script("abcdef"), {"max_output_tokens": 2}),
    (script(""), {}),
]


@pytest.mark.parametrize(("said", "fields"), RESPONSES)
def test_responses_and_their_events(serve: Callable[..., Any], check: Any, said: Any, fields: dict[str, Any]) -> None:
    client = serve(said)
    body = {"input": "Hi", **fields}
    check("Response", client.request("POST", "/v1/responses", json=body).json())
    events = payloads(client.request("POST", "/v1/responses", json={**body, "stream": True}).text)
    assert len(events) >= 3
    for event in events:
        check("ResponseStreamEvent", event)


def test_a_failed_response(serve: Callable[..., Any], check: Any) -> None:
    client = serve(script("a", reason="error", error="it broke"))
    *_, failed, error = payloads(client.request("POST", "/v1/responses", json={"input": "Hi", "stream": True}).text)
    check("ResponseFailedEvent", failed)
    check("ResponseErrorEvent", error)


@pytest.mark.parametrize("fields", [{}, {"echo": True, "n": 2}, {"max_tokens": 1}])
def test_completions(serve: Callable[..., Any], check: Any, fields: dict[str, Any]) -> None:
    client = serve(script("Hel", "lo"))
    body = {"prompt": ["Hi", "Ho"], **fields}
    check("CreateCompletionResponse", client.request("POST", "/v1/completions", json=body).json())
    for chunk in payloads(client.request("POST", "/v1/completions", json={**body, "stream": True}).text):
        check_chunk("/completions", chunk, check)


def test_models(serve: Callable[..., Any], check: Any) -> None:
    client = serve(script("a"))
    check("ListModelsResponse", client.request("GET", "/v1/models").json())
    check("Model", client.request("GET", "/v1/models/demo").json())


def test_errors(serve: Callable[..., Any], check: Any) -> None:
    client = serve(script("a"))
    for answer in (
        client.chat(model="other"),
        client.chat(n=99),
        client.chat(audio={"voice": "x"}),
        client.request("GET", "/nothing"),
        client.request("DELETE", "/v1/models"),
        client.request("POST", "/v1/responses", json={"input": 5}),
        client.request("POST", "/v1/completions", json={}),
    ):
        assert answer.status_code >= 400
        check("ErrorResponse", answer.json())


def test_the_check_can_fail(check: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check("CreateChatCompletionResponse", {"id": "x"})
    with pytest.raises(jsonschema.ValidationError):
        check("ErrorResponse", {"error": "text"})
    with pytest.raises(jsonschema.ValidationError):
        check("ResponseStreamEvent", {"type": "response.completed", "sequence_number": 1})
    with pytest.raises(jsonschema.ValidationError):
        check("Response", {"id": "x"})


SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
HONOURED = {
    "/chat/completions": set(ChatRequest.model_fields),
    "/completions": set(CompletionRequest.model_fields),
    "/responses": set(ResponsesRequest.model_fields),
}
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def fuzzed(prompts: PromptRenderer, listening: Any) -> Iterator[str]:
    with Bridge(FakeEngine(lambda _: script("Hel", "lo"))) as bridge:
        with listening(create_app(ChatService(bridge, prompts, ("demo",)), AppSettings())) as address:
            yield f"{address}/v1"


def ask(case: schemathesis.Case, address: str, check: Any) -> int:
    """Send the case, hold the answer against the description; returns the status."""
    answer = case.call(base_url=address)
    if answer.status_code >= 400:
        assert answer.status_code < 500, answer.text
        check("ErrorResponse", answer.json())
    elif answer.headers["content-type"][0].startswith("text/event-stream"):
        for chunk in payloads(answer.text):
            check_chunk(case.path, chunk, check)
    else:
        case.validate_response(answer, checks=[content_type_conformance, response_schema_conformance])
    return answer.status_code


@SCHEMA.parametrize()
@FUZZ
def test_any_request_gets_a_described_answer(case: schemathesis.Case, fuzzed: str, check: Any) -> None:
    ask(case, fuzzed, check)


@SCHEMA.include(method="POST").parametrize()
@FUZZ
def test_requests_with_honoured_fields_only(case: schemathesis.Case, fuzzed: str, check: Any) -> None:
    """The same requests without what is refused by name, so that most get past the first check."""
    if isinstance(case.body, dict):
        honoured = HONOURED[case.path]
        case.body = {name: value for name, value in case.body.items() if name in honoured} | {"model": "demo"}
    ask(case, fuzzed, check)
