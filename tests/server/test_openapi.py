"""Our answers against OpenAI's own description of them, where that file is at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.fakes import script

PROJECT = Path(__file__).resolve().parents[2]
DESCRIPTION = PROJECT.parent / "shared" / "openai-openapi.yaml"
NEEDED = ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse", "ListModelsResponse", "Model")
NEEDED_ERROR = "ErrorResponse"

pytestmark = pytest.mark.skipif(
    not DESCRIPTION.exists(), reason="OpenAI's description (../shared/openai-openapi.yaml) is not beside the project"
)

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


def component(text: str, name: str) -> str:
    """The lines of one schema. Parsing all three megabytes would take half a minute."""
    start = text.index(f"\n    {name}:\n") + 1
    lines = text[start:].splitlines()
    end = next(
        (index for index, line in enumerate(lines[1:], 1) if line.strip() and not line.startswith("     ")), len(lines)
    )
    return "\n".join(lines[:end])


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """The needed component schemas and all they refer to, as JSON schema."""
    import yaml

    text = DESCRIPTION.read_text()
    text = text[text.index("\ncomponents:") :]
    text = text[text.index("\n  schemas:") :]
    found: dict[str, Any] = {}
    missing = [*NEEDED, NEEDED_ERROR]
    while missing:
        name = missing.pop()
        if name in found:
            continue
        found[name] = as_json_schema(yaml.safe_load(component(text, name))[name], missing)
    return found


def as_json_schema(node: Any, references: list[str]) -> Any:
    """Resolve `nullable`, which JSON schema does not know, and note every reference."""
    if isinstance(node, list):
        return [as_json_schema(each, references) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: as_json_schema(value, references) for key, value in node.items()}
    if isinstance(node.get("$ref"), str):
        references.append(node["$ref"].rpartition("/")[2])
    if node.pop("nullable", False) is True:
        return {"anyOf": [node, {"type": "null"}]}
    return node


@pytest.fixture
def check(schemas: dict[str, Any]) -> Callable[[str, Any], None]:
    def validate(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        jsonschema.Draft202012Validator(schema).validate(value)

    return validate


@pytest.mark.parametrize(("said", "fields"), REQUESTS)
def test_bodies_and_chunks(serve: Callable[..., Any], check: Any, said: Any, fields: dict[str, Any]) -> None:
    import json

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
