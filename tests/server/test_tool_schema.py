"""Schemas of tools as a chat template can print them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.errors import ApiError
from server.tool_schema import MAX_DEPTH, for_template, typed


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def flat(parameters: Any) -> Any:
    (written,) = for_template([tool(parameters)])
    return written["function"]["parameters"]


def refusal(parameters: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        for_template([tool({}), tool(parameters)])
    assert (caught.value.status, caught.value.param) == (400, "tools[1].function.parameters")
    return caught.value


class Address(BaseModel):
    street: str
    zip_code: int | None = None


class Order(BaseModel):
    """What frameworks make of a typed function: references, optional fields, lists of models."""

    to: Address
    others: list[Address] | None = None
    note: str | None = None
    amount: int | float = 1


def test_a_pydantic_model_loses_nothing() -> None:
    written = flat(Order.model_json_schema())
    assert "$" not in json.dumps(written)
    assert "anyOf" not in json.dumps(written)
    address = {
        "type": "object",
        "properties": {
            "street": {"type": "string"},
            "zip_code": {"type": "integer", "nullable": True, "default": None},
        },
        "required": ["street"],
    }
    properties = written["properties"]
    assert properties["to"] == address
    assert properties["others"] == {"type": "array", "items": address, "nullable": True, "default": None}
    assert properties["note"] == {"type": "string", "nullable": True, "default": None}
    assert properties["amount"] == {"type": "integer", "description": "May be integer or number.", "default": 1}
    assert written["required"] == ["to"]


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": ["string", "null"]}, {"type": "string", "nullable": True}),
        (
            {"type": ["string", "integer"], "description": "An id."},
            {"type": "string", "description": "An id. May be string or integer."},
        ),
        ({"type": "null"}, {"type": "null"}),
        ({"type": ["null"]}, {"type": "null", "nullable": True}),
        ({"anyOf": [{"type": "null"}]}, {"type": "null", "nullable": True}),
        ({"const": "x"}, {"type": "string", "enum": ["x"]}),
        ({"enum": ["a", None]}, {"type": "string", "nullable": True, "enum": ["a"]}),
        ({"enum": ["a", 1]}, {"enum": ["a", 1]}),
        ({"oneOf": [{"const": "a"}, {"const": "b"}]}, {"type": "string", "enum": ["a", "b"]}),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string"}]}, {"type": "string"}),
        ({"properties": {"x": {}}}, {"type": "object", "properties": {"x": {}}}),
        ({"items": {"type": "string"}}, {"type": "array", "items": {"type": "string"}}),
        ({"prefixItems": [{"type": "string"}]}, {"type": "array", "items": {"type": "string"}}),
        ({"type": "object", "additionalProperties": False, "title": "T"}, {"type": "object"}),
        (
            {"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]},
            {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
        ),
        (
            {
                "anyOf": [
                    {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
                    {"type": "object", "properties": {"b": {}, "c": {}}, "required": ["b"]},
                ]
            },
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["b"]},
        ),
        (True, {}),
        ("nonsense", {}),
        ({"type": 5, "properties": [], "items": 3, "anyOf": {}, "enum": 7, "required": "x"}, None),
    ],
)
def test_words_a_template_loses(schema: Any, written: Any) -> None:
    result = flat({"type": "object", "properties": {"p": schema}})["properties"]["p"]
    if written is not None:
        assert result == written


def test_what_is_said_beside_a_reference_wins() -> None:
    schema = {
        "$defs": {"A/b~c": {"type": "string", "description": "general"}},
        "properties": {"p": {"$ref": "#/$defs/A~1b~0c", "description": "particular"}},
    }
    assert flat(schema)["properties"]["p"] == {"type": "string", "description": "particular"}


def test_a_recursion_is_named_once_and_ends() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}
    written = flat({"$defs": {"Tree": tree}, "$ref": "#/$defs/Tree"})
    assert written["properties"]["kids"]["items"] == {"type": "object", "description": "Again Tree."}
    assert flat({"properties": {"me": {"$ref": "#"}}})["properties"]["me"]["type"] == "object"


def test_a_reference_that_leads_nowhere_is_refused_by_name() -> None:
    for reference in ("#/$defs/Missing", "https://example.com/schema.json", "other.json"):
        assert reference in refusal({"properties": {"p": {"$ref": reference}}}).message


def test_schemas_that_grow_are_refused_within_limits() -> None:
    began = time.process_time()
    doubling = {f"d{n}": {"properties": {side: {"$ref": f"#/$defs/d{n + 1}"} for side in "ab"}} for n in range(25)}
    doubling["d25"] = {"type": "string"}
    assert "parts" in refusal({"$defs": doubling, "$ref": "#/$defs/d0"}).message
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH + 1):
        deep = {"properties": {"x": deep}}
    assert "levels" in refusal(deep).message
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)}
    assert "levels" in refusal({"$defs": chain, "$ref": "#/$defs/d0"}).message
    assert "parts" in refusal({"properties": {f"p{n}": {"type": "string"} for n in range(30_000)}}).message
    assert time.process_time() - began < 5


def test_a_thousand_tools_are_served() -> None:
    assert len(for_template([tool(Address.model_json_schema())] * 1000)) == 1000


def test_tools_without_parameters_stay_as_they_are() -> None:
    bare = {"type": "function", "function": {"name": "f"}}
    assert for_template([bare, tool(None)]) == [bare, tool(None)]


def test_the_schema_of_the_client_is_left_alone() -> None:
    schema = Order.model_json_schema()
    before = json.dumps(schema)
    flat(schema)
    assert json.dumps(schema) == before


WORDS = ["type", "$ref", "anyOf", "allOf", "oneOf", "properties", "items", "prefixItems", "enum", "const", "required"]
LEAVES = st.sampled_from(["string", "null", "object", "#", "#/$defs/a", "#/properties/x", None, True, 1, 1.5, "text"])
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*WORDS, "$defs", "a", "x", "nullable", "additionalProperties"]), inner)
    ),
    max_leaves=20,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*WORDS, "$defs", "x"]), SCHEMAS, max_size=6), SCHEMAS)
def test_any_schema_is_written_out_or_refused(schema: dict[str, Any], value: Any) -> None:
    try:
        json.dumps(flat(schema))
    except ApiError as error:
        assert error.status == 400
    typed(value, schema, schema)
