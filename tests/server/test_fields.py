"""Every field that OpenAI's description names is honoured, harmless, or refused by name; none is left to chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from server.dialects import completions, responses_schema
from server.dialects.chat_schema import ChatRequest
from server.dialects.completions import CompletionRequest
from server.dialects.responses_schema import ResponsesRequest
from server.schema import UNSUPPORTED, MeansOff
from tests.fakes import script

Serve = Callable[..., Any]
DESCRIPTION = json.loads((Path(__file__).parent / "openai" / "description.json").read_text(encoding="utf-8"))
ROUTES: dict[str, tuple[type[BaseModel], Mapping[str, MeansOff], dict[str, Any]]] = {
    "/chat/completions": (ChatRequest, UNSUPPORTED, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/completions": (CompletionRequest, completions._UNSUPPORTED, {"prompt": "Hi"}),
    "/responses": (ResponsesRequest, responses_schema._UNSUPPORTED, {"input": "Hi"}),
}
# What cannot change the text: identifiers, hints for caches, for speed and for billing. With a value somebody sends.
HARMLESS: dict[str, Any] = {
    "max_tool_calls": 3,  # of tools that run at OpenAI's
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "Hi"},  # a hint for speed
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "flex",
    "store": True,
    "stream_options": {"include_obfuscation": True},
    "truncation": "auto",  # a prompt that is too long is refused either way
    "user": "me",
    "verbosity": "low",  # a wish; how much is said cannot be promised
}
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "background": True,
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prompt": {"id": "pmpt_1"},
    "web_search_options": {"search_context_size": "low"},
}


def described(path: str) -> set[str]:
    """The names of the fields of a route's body."""

    def fields(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return fields(DESCRIPTION["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]])
        own = set(schema.get("properties", {}))
        return own.union(*(fields(each) for each in schema.get("allOf", [])))

    body = DESCRIPTION["paths"][path]["post"]["requestBody"]
    return fields(body["content"]["application/json"]["schema"])


@pytest.mark.parametrize("path", ROUTES)
def test_no_field_is_left_to_chance(path: str) -> None:
    model, unsupported, _ = ROUTES[path]
    names, honoured = described(path), set(model.model_fields)
    assert len(names) > 10
    refused = set(unsupported) - honoured
    assert names - honoured - refused - set(HARMLESS) == set(), "decide what happens to these"
    assert not refused & set(HARMLESS), "cannot be both"
    assert not (set(HARMLESS) - honoured) & set(unsupported)


@pytest.mark.parametrize("path", ROUTES)
def test_harmless_fields_are_accepted_and_the_others_refused_by_name(serve: Serve, path: str) -> None:
    model, unsupported, body = ROUTES[path]
    client = serve(script("Hi"))
    for name in described(path):
        if name in HARMLESS and name not in model.model_fields:
            answer = client.request("POST", f"/v1{path}", json={**body, name: HARMLESS[name]})
            assert answer.status_code == 200, (name, answer.text)
        elif name in unsupported and name in REFUSED and name not in model.model_fields:
            error = client.request("POST", f"/v1{path}", json={**body, name: REFUSED[name]}).json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported_value"), name
