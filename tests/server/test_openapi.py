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


@pytest.mark.parametrize(("said", "fields"), REQUESTS)
def test_bodies_and_chunks(serve: Callable[..., Any], check: Any, said: Any, fields: dict[str, Any]) -> None:
    client = serve(said)
    check("CreateChatCompletionResponse", client.chat(**fields).json())
    for options in ({}, {"stream_options": {"include_usage": True}}):
        lines = client.chat(stream=True, **options, **fields).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert len(chunks) >= 2
        for chunk in chunks:
            check("CreateChatCompletionStreamResponse", chunk)


def test_models(serve: Callable[..., Any], check: Any) -> None:
    client = serve(script("a"))
    check("ListModelsResponse", client.request("GET", "/v1/models").json())
    check("Model", client.request("GET", "/v1/models/demo").json())


def test_errors(serve: Callable[..., Any], check: Any) -> None:
    client = serve(script("a"))
    for answer in (
        client.chat(model="other"),
        client.chat(n=99),
        client.chat(logprobs=True),
        client.request("GET", "/nothing"),
        client.request("DELETE", "/v1/models"),
    ):
        assert answer.status_code >= 400
        check("ErrorResponse", answer.json())


def test_the_check_can_fail(check: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check("CreateChatCompletionResponse", {"id": "x"})
    with pytest.raises(jsonschema.ValidationError):
        check("ErrorResponse", {"error": "text"})


SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
HONOURED = set(ChatRequest.model_fields)
FUZZ = settings(
    max_examples=80, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
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
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        for chunk in chunks:
            check("CreateChatCompletionStreamResponse", chunk)
    else:
        case.validate_response(answer, checks=[content_type_conformance, response_schema_conformance])
    return answer.status_code


@SCHEMA.parametrize()
@FUZZ
def test_any_request_gets_a_described_answer(case: schemathesis.Case, fuzzed: str, check: Any) -> None:
    ask(case, fuzzed, check)


@SCHEMA.include(path="/chat/completions").parametrize()
@FUZZ
def test_requests_with_honoured_fields_only(case: schemathesis.Case, fuzzed: str, check: Any) -> None:
    """The same requests without what is refused by name, so that most get past the first check."""
    if isinstance(case.body, dict):
        case.body = {name: value for name, value in case.body.items() if name in HONOURED} | {"model": "demo"}
    ask(case, fuzzed, check)
