"""JSON schemas as llguidance reads them: what it would read otherwise than JSON Schema means is put right or refused.

Separators are `,` and `:` with one space or none behind them, or a new line with an indentation behind `,`. There is
no other white space, so an untrained model cannot write white space for ever and most of an object is no choice at all.
Properties come in the schema's order.
`format` is enforced where llguidance knows it and a note otherwise, as in JSON Schema.
Invariant: a JSON text that follows the grammar is valid against the schema, or the schema is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from server.automaton import BadGrammar

Json = dict[str, Any]

LARGEST_INTEGER = 9 * 10**18  # digits without end are no answer either; all that fits 64 bits has room
MAX_CHARACTERS = 500_000
MAX_DEPTH = 60  # schemas within schemas
MAX_PROPERTIES = 1_000  # of one object: compiling takes more than the square of their number
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)  # fmt: skip
# Keywords with values of the wrong type fail in many ways; all of them mean "this is no schema".
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": r",( |\n {0,24})?", "key_separator": ": ?"}
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def json_grammar(schema: Any) -> Json:
    """The grammar of the JSON texts that are valid against a schema, as llguidance's JSON. Raises BadGrammar."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise BadGrammar("a schema is an object" if schema is not False else "nothing is valid against 'false'")
    if "draft-03" in str(schema.get("$schema")):
        raise BadGrammar("'$schema' draft-03 is not supported")
    try:
        text = json.dumps(_prepared(schema, 0))
        if len(text) > MAX_CHARACTERS:
            raise BadGrammar(f"the schema is longer than {MAX_CHARACTERS:,} characters")
        grammar: Json = json.loads(LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS))["grammars"][0]
    except UNREADABLE as error:
        raise BadGrammar(f"the schema cannot be read: {error}"[:300]) from error
    return grammar


def _prepared(node: Any, depth: int) -> Any:
    if not isinstance(node, dict):
        return node
    if depth > MAX_DEPTH:
        raise BadGrammar(f"the schema is nested more than {MAX_DEPTH} levels deep")
    result = {key: value for key, value in node.items() if key != "x-guidance"}
    if result.get("uniqueItems") is False:
        del result["uniqueItems"]
    if isinstance(result.get("format"), str) and result["format"] not in FORMATS:
        del result["format"]
    if result.get("type") == "integer" and not result.keys() & {"enum", "const", "multipleOf"}:
        if not result.keys() & {"minimum", "exclusiveMinimum"}:
            result["minimum"] = -LARGEST_INTEGER
        if not result.keys() & {"maximum", "exclusiveMaximum"}:
            result["maximum"] = LARGEST_INTEGER
    _check_counts(result)
    for key, value in _children(result):
        result[key] = value(depth + 1)
    return result


def _children(node: Json) -> Iterator[tuple[str, Any]]:
    """What of a schema holds further schemas, each with a function that prepares it."""
    for key in _ONE:
        if isinstance(node.get(key), dict):
            yield key, lambda depth, value=node[key]: _prepared(value, depth)
    for key in _LIST:
        if isinstance(node.get(key), list):
            yield key, lambda depth, value=node[key]: [_prepared(each, depth) for each in value]
    for key in _NAMED:
        if isinstance(node.get(key), dict):
            yield (
                key,
                lambda depth, value=node[key]: {name: _prepared(each, depth) for name, each in value.items()},
            )


def _check_counts(node: Json) -> None:
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise BadGrammar(f"'properties' of one object are more than {MAX_PROPERTIES:,}")
    required = node.get("required")
    least = node.get("minProperties")
    # Keys that are not declared may come twice, which is one property, and no grammar can count that.
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        raise BadGrammar("'minProperties' above 1 is supported only up to the number of 'required' properties")
