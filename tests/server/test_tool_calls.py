"""Gemma's call syntax to JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.tool_calls import QUOTE, ParsedCall, new_call_id, parse_call


def symbols(text: str) -> list[str]:
    out: list[str] = []
    for index, part in enumerate(text.split(QUOTE)):
        out += [QUOTE, *part] if index else [*part]
    return out


def read(text: str) -> ParsedCall | None:
    return parse_call(symbols(text))


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
    ("text", "arguments"),
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
def test_calls(text: str, arguments: dict[str, Any]) -> None:
    call = read(text)
    assert call is not None
    assert call.name == "f"
    assert json.loads(call.arguments) == arguments


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f{a:1}",
        "call:{a:1}",
        "call:f",
        "call:f{",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1",
        "call:f{a:1,}",
        "call:f{a:1}}",
        "call:f{a:1}x",
        "call:f{a:1 b:2}",
        "call:f{a:1,a:2}",
        "call:f{a:[1}",
        "call:f{a:Paris}",
        'call:f{a:<|"|>Paris}',
        "call:f{a:01}",
        "call:f{a:NaN}",
        "call:f{a:1e999}",
        "call:f{a:" + "[" * 100 + "]" * 100 + "}",
        "call:f{a:1.5,:2}",
    ],
)
def test_what_is_no_call_is_refused_and_never_guessed(text: str) -> None:
    assert read(text) is None


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8).filter(lambda text: QUOTE not in text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True), values, max_size=4))
def test_whatever_the_template_writes_is_read_back(arguments: dict[str, Any]) -> None:
    call = read("call:get_weather" + written(arguments))
    assert call is not None
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == arguments


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text('call:f{}[]",01ae \n', max_size=30))
def test_any_text_is_a_call_or_not_but_never_an_error(text: str) -> None:
    call = read("call:f{" + text)
    assert call is None or isinstance(json.loads(call.arguments), dict)


def test_ids_differ() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
    assert new_call_id().startswith("call_")
