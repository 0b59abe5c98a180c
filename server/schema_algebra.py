"""Schemas put together: what holds where two of them hold, and which of them cannot both hold.

Knows JSON Schema's keywords as far as `call_grammar` follows them, all references already replaced.
Invariant: what cannot be said exactly is refused (BadGrammar), never approximated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.automaton import BadGrammar

Json = dict[str, Any]

NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ALL_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; 1 and true are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def kinds_of(node: Json) -> Sequence[str]:
    """The types a schema allows, in JSON Schema's words; concluded from its other keywords where it names none."""
    declared = node.get("type")
    if isinstance(declared, str):
        kinds: Sequence[str] = [declared]
    elif isinstance(declared, list):
        kinds = [str(kind) for kind in declared]
    elif node.keys() & {"properties", "required", "additionalProperties"}:
        kinds = ["object"]
    elif node.keys() & {"items", "prefixItems", "minItems", "maxItems"}:
        kinds = ["array"]
    elif node.keys() & {"pattern", "format", "minLength", "maxLength"}:
        kinds = ["string"]
    elif node.keys() & set(NUMERIC):
        kinds = ["number"]
    else:
        kinds = ALL_TYPES
    for kind in kinds:
        if kind not in ALL_TYPES:
            raise BadGrammar(f"'type' {kind[:40]!r} is not supported")
    return kinds


def both(one: Json, other: Json) -> Json:
    """A schema that holds where both do. Raises BadGrammar where that takes more than a schema of these keywords."""
    result = dict(one)
    for key, value in other.items():
        mine: Any = result.get(key)
        if key not in result or same(mine, value):
            result[key] = value
        elif key == "properties":
            result[key] = {
                **mine,
                **{name: {"allOf": [mine[name], each]} if name in mine else each for name, each in value.items()},
            }
        elif key == "required":
            result[key] = list(dict.fromkeys([*mine, *value]))
        elif key == "type":
            result[key] = _shared_types(kinds_of({"type": mine}), kinds_of({"type": value}))
        elif key == "enum":
            result[key] = [each for each in mine if any(same(each, also) for also in value)]
        elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
            result[key] = max(mine, value)
        elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
            result[key] = min(mine, value)
        else:
            raise BadGrammar(f"'{key}' in more than one schema that must hold at once is not supported")
    if _closed_elsewhere(one, other) or _closed_elsewhere(other, one):
        raise BadGrammar("'additionalProperties' false beside properties of another schema is not supported")
    return result


def _closed_elsewhere(one: Json, other: Json) -> bool:
    """Whether `one` forbids properties that `other` declares."""
    rule = one.get("additionalProperties", True)
    return rule not in (True, {}) and bool(
        (other.get("properties") or {}).keys() - (one.get("properties") or {}).keys()
    )


def _shared_types(one: Sequence[str], other: Sequence[str]) -> list[str]:
    def within(kind: str, kinds: Sequence[str]) -> bool:
        return kind in kinds or (kind == "integer" and "number" in kinds)

    return [kind for kind in ALL_TYPES if within(kind, one) and within(kind, other) and (kind in one or kind in other)]


def exclusive(branches: Sequence[Any]) -> bool:
    """Whether a value can be valid against one of the branches at most."""
    return all(_apart(one, other) for index, one in enumerate(branches) for other in branches[index + 1 :])


def _apart(one: Any, other: Any) -> bool:
    if one is False or other is False:
        return True
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    if all(isinstance(each.get("type"), str | list) for each in (one, other)):
        if not _shared_types(kinds_of(one), kinds_of(other)):
            return True
    mine, theirs = _constants(one), _constants(other)
    if mine is not None and theirs is not None:
        return not mine & theirs
    shared = set(one.get("required") or ()) & set(other.get("required") or ())
    for name in shared:
        first, second = ((each.get("properties") or {}).get(name) for each in (one, other))
        if isinstance(first, dict) and isinstance(second, dict) and _is_object(one) and _is_object(other):
            mine, theirs = _constants(first), _constants(second)
            if mine is not None and theirs is not None and not mine & theirs:
                return True
    return False


def _is_object(node: Json) -> bool:
    return node.get("type") == "object"


def _constants(node: Json) -> set[str] | None:
    if "const" in node:
        return {json.dumps(node["const"], sort_keys=True)}
    if isinstance(node.get("enum"), list):
        return {json.dumps(each, sort_keys=True) for each in node["enum"]}
    return None
