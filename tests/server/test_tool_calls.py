"""Gemma's call syntax to JSON."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.tool_calls import QUOTE, QUOTE_SIGN, ParsedCall, new_call_id, parse_calls, parse_leading_calls


def read_all(text: str, schema: Any = None) -> list[ParsedCall]:
    return parse_calls(text.replace(QUOTE, QUOTE_SIGN), {"f": schema or {}})


def read(text: str, schema: Any = None) -> ParsedCall | None:
    calls = read_all(text, schema)
    assert len(calls) <= 1
    return calls[0] if calls else None


def arguments(text: str, schema: Any = None) -> Any:
    call = read(text, schema)
    return None if call is None else json.loads(call.arguments)


def written(value: Any) -> str:
    """A value in the model's syntax."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(each) for each in value) + "]"
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("call:f{}", {}),
        ('call:f{city:<|"|>Paris<|"|>,days:2}', {"city": "Paris", "days": 2}),
        ("call:f{a:true,b:false,c:null,d:-1.5e3}", {"a": True, "b": False, "c": None, "d": -1500.0}),
        ('call:f{o:{k:[1,{x:<|"|>y<|"|>},[]]},e:{}}', {"o": {"k": [1, {"x": "y"}, []]}, "e": {}}),
        ('call:f{t:<|"|>a,b:{c}"d"\\n[e]<|"|>}', {"t": 'a,b:{c}"d"\\n[e]'}),
        ('call:f{<|"|>quoted key<|"|>:1}', {"quoted key": 1}),
        (" call : f { a : 1 , b : [ 1 , 2 ] } ", {"a": 1, "b": [1, 2]}),
        (":f{a:1}", {"a": 1}),
        ('call:f{t:<|"|><|"|>}', {"t": ""}),
        ("call:f{n:12345678901234567890}", {"n": 12345678901234567890}),
    ],
)
def test_calls(text: str, given: dict[str, Any]) -> None:
    call = read(text)
    assert call is not None
    assert call.name == "f"
    assert json.loads(call.arguments) == given


FALLEN_BACK = [
    # text, arguments: forms models write instead, deep in a context
    ("call:f(a='b')", {"a": "b"}),
    ("call:f(a='b', n=5, ok=True, no=False, x=None)", {"a": "b", "n": 5, "ok": True, "no": False, "x": None}),
    ("call:f(tags=[\"x\", 'y'], o={\"k\": 1, 'j': [2]})", {"tags": ["x", "y"], "o": {"k": 1, "j": [2]}}),
    ("call:f()", {}),
    ('call:f{query="weather in Paris"}', {"query": "weather in Paris"}),
    ('call:f{domain: "media_player"}', {"domain": "media_player"}),
    ('call:f{t:"one, two, three",n:1}', {"t": "one, two, three", "n": 1}),
    ('call:f{t:"he said "hi", twice",n:1}', {"t": 'he said "hi", twice', "n": 1}),
    (r'call:f{t:"a\n\"b\"\\c\u00e9"}', {"t": 'a\n"b"\\cé'}),
    (r'call:f{p:"C:\Users\me"}', {"p": r"C:\Users\me"}),
    ('call:f{"a": "b", "n": 2}', {"a": "b", "n": 2}),
    ("call:f{'a': 1}", {"a": 1}),
    ("call:f{city:Paris}", {"city": "Paris"}),
    ("call:f{city:New York, days:2}", {"city": "New York", "days": 2}),
    ("call:f{q:hello, world,days:2}", {"q": "hello, world", "days": 2}),
    ("call:f{url:https://a.b/c?d=e&f=g,n:1}", {"url": "https://a.b/c?d=e&f=g", "n": 1}),
    ("call:f{cmd:echo {x} (y),n:1}", {"cmd": "echo {x} (y)", "n": 1}),
    ("call:f{t:it's fine}", {"t": "it's fine"}),
    ("call:f{t:'tis fine}", {"t": "'tis fine"}),
    ("call:f{l:[Paris, Rome]}", {"l": ["Paris", "Rome"]}),
    ("call:f{d:2026-11-24,t:12:30}", {"d": "2026-11-24", "t": "12:30"}),
    ("call:f{a:1", {"a": 1}),
    ("call:f{a:1,", {"a": 1}),
    ("call:f{a:1,}", {"a": 1}),
    ("call:f{a:[1,{b:2", {"a": [1, {"b": 2}]}),
    ("call:f{a:1}}", {"a": 1}),
    ("call:f{a:1}\n}\n}", {"a": 1}),
    ("call:f{", {}),
    ('call:f{a:<|"|>Paris}', {"a": "Paris"}),
    ('call:f{o:{a:[<|"|>x]}}', {"o": {"a": ["x"]}}),
    ('call:f{a:<|"|>say "hi"', {"a": 'say "hi"'}),
    ('call:f{a:"Paris}', {"a": "Paris"}),
    ('call:f{a:"Paris<|"|>,n:1}', {"a": "Paris", "n": 1}),
    ("f{a:1}", {"a": 1}),
    ("call:f{a:01}", {"a": "01"}),
    ("call:f{a:NaN,b:1e999}", {"a": "NaN", "b": "1e999"}),
    ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
    ('{<|"|>name<|"|>: "f", "parameters": {"a": "b"}}', {"a": "b"}),
]


@pytest.mark.parametrize(("text", "given"), FALLEN_BACK)
def test_forms_models_fall_back_to(text: str, given: dict[str, Any]) -> None:
    assert arguments(text) == given


def test_declared_names_tell_where_bare_text_ends() -> None:
    text = "call:f{q:hello, note: this is text,days:2}"
    assert arguments(text) == {"q": "hello", "note": "this is text", "days": 2}
    declared = {"properties": {"q": {"type": "string"}, "days": {"type": "integer"}}}
    assert arguments(text, declared) == {"q": "hello, note: this is text", "days": 2}


def test_several_calls_between_one_pair_of_markers() -> None:
    for text in ("call:f{a:1}call:f{a:2}", "call:f{a:1}\ncall:f(a=2)", "call:f{a:1}, call:f{a:2};", "f{a:1} f{a:2}"):
        assert [json.loads(call.arguments) for call in read_all(text)] == [{"a": 1}, {"a": 2}]
    both = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    assert [call.name for call in read_all(both)] == ["f", "g"]


def test_calls_at_the_beginning_of_text() -> None:
    calls, rest = parse_leading_calls("call:f{a:1}\ncall:f{a:2}\nThat is all.", {"f": {}})
    assert ([json.loads(call.arguments) for call in calls], rest) == ([{"a": 1}, {"a": 2}], "That is all.")
    assert parse_leading_calls("call:f{a}", {"f": {}}) == ([], "call:f{a}")


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "$defs": {"Size": {"enum": ["1", "2"]}, "Tree": TREE}}


TREE = {"type": "object", "properties": {"n": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}  # fmt: skip  # noqa: E501
STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


@pytest.mark.parametrize(
    ("schema", "written_as", "value"),
    [
        (STRING, "5", "5"),
        (STRING, "true", "true"),
        (STRING, "1.50", "1.50"),
        (STRING, "null", None),
        (STRING, '<|"|>null<|"|>', "null"),
        (STRING, '<|"|>5<|"|>', "5"),
        (STRING, '<|"|>{"a":1}<|"|>', '{"a":1}'),
        (INTEGER, '<|"|>5<|"|>', 5),
        (INTEGER, "'5'", 5),
        (INTEGER, "5.0", 5),
        (INTEGER, "5.5", 5.5),
        (INTEGER, "five", "five"),
        (NUMBER, "5", 5),
        (NUMBER, "2.0", 2.0),
        (NUMBER, '"-1e3"', -1000.0),
        (BOOLEAN, '<|"|>true<|"|>', True),
        (BOOLEAN, "False", False),
        (BOOLEAN, "yes", "yes"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "null"]}, '"null"', None),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, '"5"', "5"),
        ({"anyOf": [INTEGER, {"type": "null"}]}, '"7"', 7),
        ({"anyOf": [STRING, {"type": "null"}]}, "7", "7"),
        ({"$ref": "#/$defs/Size"}, "2", "2"),
        ({"enum": [1, 2]}, '"2"', 2),
        ({"const": True}, '"true"', True),
        ({"type": "array", "items": STRING}, "[1,true,x]", ["1", "true", "x"]),
        ({"type": "array", "items": INTEGER}, '<|"|>[1, "2"]<|"|>', [1, 2]),
        ({"type": "object"}, '<|"|>{"a": [1]}<|"|>', {"a": [1]}),
        ({"type": "object"}, '<|"|>{broken<|"|>', "{broken"),
        ({"type": "object", "additionalProperties": STRING}, "{a:1}", {"a": "1"}),
        ({"$ref": "#/$defs/Tree"}, "{n:1,kids:[{n:2,kids:[]}]}", {"n": "1", "kids": [{"n": "2", "kids": []}]}),
        ({"allOf": [{"$ref": "#/$defs/Tree"}]}, "{n:1}", {"n": "1"}),
        ({}, "5", 5),
        (True, "x", "x"),
        ({"type": "array"}, "[1,a]", [1, "a"]),
        ({"$ref": "#/nowhere"}, "1", 1),
        ({"type": 5, "enum": "x", "properties": [], "anyOf": {}}, "1", 1),
    ],
)
def test_values_are_typed_by_the_schema(schema: Any, written_as: str, value: Any) -> None:
    result = arguments(f"call:f{{v:{written_as}}}", of(v=schema))["v"]
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "call:{a:1}",
        "call:f",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1}x",
        "call:f{a:1,a:2}",
        "call:f{a:[1}",
        "call:f{a:" + "[" * 100 + "]" * 100 + "}",
        "g{a:1}",
        "call:f(1)",
        'call:f{a:<|"|>x<|"|> y}',
        'call:f{a:x<|"|>y}',
        "call:f{a:1} g",
        '{"name": "f"}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "two words", "arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        "[]",
        "[1]",
        "5",
    ],
)
def test_what_is_no_call_is_refused_and_never_guessed(text: str) -> None:
    assert read(text) is None


# Of each property; `make fuzz CASES=...` tries more.
EXAMPLES = int(os.environ.get("FUZZ_CASES", "0")) // 100 or 40
relaxed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def nested(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    scalars = (
        st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    )
    keys = st.from_regex(r"[a-z_]{1,5}", fullmatch=True)
    return st.recursive(
        scalars | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner), max_leaves=8
    )


values = nested(st.text(max_size=8).filter(lambda text: QUOTE not in text))
plain_values = nested(st.text("ab1 .:-=é漢", max_size=8))  # plain quotes are ambiguous around delimiters


@relaxed
@given(st.dictionaries(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True), values, max_size=4))
def test_whatever_the_template_writes_is_read_back(arguments: dict[str, Any]) -> None:
    call = read("call:get_weather" + written(arguments))
    assert call is not None
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == arguments


@relaxed
@given(st.text("call:f{}[]()'\",=01ae \\\n" + QUOTE_SIGN, max_size=40))
def test_any_text_is_a_call_or_not_but_never_an_error(text: str) -> None:
    for call in read_all("call:f{" + text):
        assert isinstance(json.loads(call.arguments), dict)
        call.arguments.encode("utf-8")  # the quote sign never gets out


@relaxed
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), plain_values, max_size=4))
def test_python_calls_are_read_back(given_arguments: dict[str, Any]) -> None:
    text = ", ".join(f"{key}={value!r}" for key, value in given_arguments.items())
    assert arguments(f"call:f({text})") == given_arguments


@pytest.mark.parametrize("piece", ["'a, ", '"a, ', "a, ", "[", "{a:", "(", '"', "a:1,", "call:f{a:1}", " ", "\\"])
def test_the_work_is_linear(piece: str) -> None:
    began = time.process_time()
    read_all("call:f{x:" + piece * 20_000)
    assert time.process_time() - began < 5  # quadratic would take minutes


def test_ids_differ() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
    assert new_call_id().startswith("call_")
