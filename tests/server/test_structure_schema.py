"""server.dialects.structure_schema: every field that asks for a form, in every wire format, and tool_choice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.dialects import anthropic, completions, openai_chat, responses
from server.dialects.response_store import ResponseStore
from server.errors import ApiError
from server.exchange import ChatTask

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
FLAT = {"type": "json_schema", "name": "x", "schema": SCHEMA}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
USER = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatTask:
    return openai_chat.read(json.dumps({"messages": USER, **fields}).encode()).task


def completion(**fields: Any) -> ChatTask:
    return completions.read(json.dumps({"prompt": "Hi", **fields}).encode()).task


def response(**fields: Any) -> ChatTask:
    return responses.read(ResponseStore(), json.dumps({"input": "Hi", **fields}).encode()).task


def message(**fields: Any) -> ChatTask:
    return anthropic.read(json.dumps({"messages": USER, "max_tokens": 9, **fields}).encode()).task


def form(task: ChatTask) -> tuple[str, Any, str]:
    assert task.structure is not None
    return task.structure.kind, task.structure.value, task.structure.param


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": FORMAT}, "json", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json", SCHEMA),
        ({"guided_json": SCHEMA}, "json", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["yes", "no", "yes"]}, "choice", ("yes", "no")),
        ({"guided_grammar": "start: A"}, "lark", "start: A"),
        ({"guided_grammar": 'root ::= "a"'}, "gbnf", 'root ::= "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ("a",)),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "gbnf", 'root ::= "a"'),
        ({"grammar": "anything"}, "gbnf", "anything"),
        ({"json_schema": SCHEMA}, "json", SCHEMA),
        ({"regex": "a+"}, "regex", "a+"),
    ],
)
def test_the_fields_of_chat_and_completions(fields: dict[str, Any], kind: str, value: Any) -> None:
    (name,) = fields
    assert form(chat(**fields)) == form(completion(**fields)) == (kind, value, name)
    if name != "response_format":
        assert form(response(**fields)) == (kind, value, name)


def test_the_field_of_responses() -> None:
    assert form(response(text={"format": FLAT})) == ("json", SCHEMA, "text.format")
    assert form(response(text={"format": {"type": "json_object"}})) == ("json", {"type": "object"}, "text.format")
    assert response(text={"format": {"type": "text"}, "verbosity": "low"}).structure is None


def test_the_fields_of_messages() -> None:
    asked = {"type": "json_schema", "schema": SCHEMA}
    assert form(message(output_format=asked)) == ("json", SCHEMA, "output_format")
    assert form(message(output_config={"format": asked, "effort": "low"})) == ("json", SCHEMA, "output_config.format")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"wrong": 1}}, "structured_outputs"),
        ({"structured_outputs": "a+"}, "structured_outputs"),
        ({"guided_json": SCHEMA, "regex": "a"}, "regex"),
        ({"guided_json": SCHEMA, "response_format": FORMAT}, "response_format"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    for read in (chat, completion):
        with pytest.raises(ApiError) as caught:
            read(**fields)
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("choice", "must_call", "names"),
    [
        ("auto", False, None),
        (None, False, None),
        ("required", True, None),
        ({"type": "function", "function": {"name": "g"}}, True, ("g",)),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
            False,
            ("f",),
        ),
    ],
)
def test_tool_choice(choice: Any, must_call: bool, names: tuple[str, ...] | None) -> None:
    task = chat(tools=TOOLS, tool_choice=choice)
    assert (task.must_call, task.callable, len(task.tools)) == (must_call, names, 2)
    assert task.named_tool == (names == ("g",))


def test_tool_choice_in_the_other_formats() -> None:
    flat = [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}]
    named = response(tools=flat, tool_choice={"type": "function", "name": "f"})
    assert (named.named_tool, named.tools[0]["function"]["strict"]) == (True, True)
    theirs = [{"name": "f", "input_schema": SCHEMA, "strict": True}]
    assert message(tools=theirs, tool_choice={"type": "any"}).must_call
    named = message(tools=theirs, tool_choice={"type": "tool", "name": "f"})
    assert (named.named_tool, named.tools[0]["function"]["strict"]) == (True, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
        {"tools": TOOLS, "tool_choice": {"type": "function"}},
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
        {"tools": TOOLS, "tool_choice": 5},
    ],
)
def test_a_tool_choice_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.param == "tool_choice"
