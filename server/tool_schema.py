"""JSON schemas of tools: flattened for the chat template, and used to type what the model wrote.

Chat templates print `type`, `properties`, `items`, `enum` and a few more, and silently lose `$ref`, `anyOf`, `allOf`
and lists of types, which is what every pydantic model with an optional or nested field becomes. `for_template` writes
the same schema without them. `typed` goes the other way: a bare or quoted word becomes the number, boolean or null
that the declared schema asks for. Knows JSON schema as far as that goes; it validates nothing.
Invariant: whatever is sent as a schema, the work is bounded, and a refusal names the tool.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from server.errors import ApiError, invalid

Json = dict[str, Any]

MAX_DEPTH = 64  # levels of one schema once its references are written out
MAX_NODES = 20_000  # subschemas of all tools of a request, written out

_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,299})(?:\.\d{1,300})?(?:[eE][+-]?\d{1,4})?")
# Python's spellings too: deep in a context models fall back to them.
_WORDS: Mapping[str, bool | None] = {
    "true": True, "false": False, "null": None, "True": True, "False": False, "None": None,
}  # fmt: skip
_NOISE = frozenset({"$defs", "definitions", "$schema", "$id", "$comment", "$anchor", "title", "examples"})


class Bare(str):
    """A value the model wrote without quotes: its type is for the schema to say."""


def for_template(tools: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Tools in OpenAI's form with schemas a template can print. Raises ApiError (400) for one that cannot be."""
    budget = _Budget()
    return [_for_template(index, tool, budget) for index, tool in enumerate(tools)]


def parameters(tools: Iterable[Mapping[str, Any]]) -> dict[str, Json]:
    """Declared schema of the arguments, by tool name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def _for_template(index: int, tool: Mapping[str, Any], budget: _Budget) -> Json:
    function = dict(tool["function"])
    if isinstance(function.get("parameters"), dict):
        try:
            function["parameters"] = _Inliner(function["parameters"], budget).schema(function["parameters"], ())
        except _Unusable as error:
            raise _refusal(index, str(error)) from error
    return {**tool, "function": function}


def _refusal(index: int, why: str) -> ApiError:
    param = f"tools[{index}].function.parameters"
    return invalid(f"{param}: {why}", param=param)


class _Unusable(Exception):
    """The schema cannot be written out. The message says why."""


class _Budget:
    """Bounds the work of one request: references can double at every level."""

    def __init__(self) -> None:
        self._left = MAX_NODES

    def take(self, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise _Unusable(f"the schemas come to more than {MAX_NODES} parts")
        if depth > MAX_DEPTH:
            raise _Unusable(f"the schema is nested more than {MAX_DEPTH} levels deep")


class _Inliner:
    """Writes one schema out. `open_refs` are the references being written: one of them again is a recursion."""

    def __init__(self, root: Json, budget: _Budget) -> None:
        self._root = root
        self._budget = budget

    def schema(self, node: Any, open_refs: tuple[str, ...], depth: int = 0) -> Json:
        self._budget.take(depth)
        if not isinstance(node, dict):  # `true` and `{}` both mean anything
            return {}
        reference = node.get("$ref")
        if isinstance(reference, str):
            return self._reference(reference, node, open_refs, depth)
        result = {key: value for key, value in node.items() if key not in _NOISE}
        for part in _dicts(result.pop("allOf", None)):
            _join(result, self.schema(part, open_refs, depth + 1))
        self._subschemas(result, open_refs, depth)
        for word in ("anyOf", "oneOf"):
            branches = [self.schema(part, open_refs, depth + 1) for part in _dicts(result.pop(word, None))]
            if branches:
                _collapse(result, branches)
        return _plain_type(result)

    def _reference(self, reference: str, node: Json, open_refs: tuple[str, ...], depth: int) -> Json:
        own = {key: value for key, value in node.items() if key != "$ref"}
        if reference in open_refs:  # a tree: its nodes are named, not written out for ever
            name = reference.rpartition("/")[2] or "the whole"
            return {"type": "object", "description": f"Again {name}.", **self.schema(own, open_refs, depth + 1)}
        target = resolve(reference, self._root)
        if target is None:
            raise _Unusable(f"'$ref' {reference[:100]!r} leads nowhere; only references inside the schema are followed")
        result = self.schema(target, (*open_refs, reference), depth + 1)
        _join(result, self.schema(own, open_refs, depth + 1), wins=True)
        return result

    def _subschemas(self, result: Json, open_refs: tuple[str, ...], depth: int) -> None:
        named = result.get("properties")
        if isinstance(named, dict):
            result["properties"] = {name: self.schema(each, open_refs, depth + 1) for name, each in named.items()}
        first = _dicts(result.pop("prefixItems", None))
        items = result.get("items")
        if isinstance(items, dict) or first:
            result["items"] = self.schema(items if isinstance(items, dict) else first[0], open_refs, depth + 1)
        more = result.pop("additionalProperties", None)
        if isinstance(more, dict):
            result["additionalProperties"] = self.schema(more, open_refs, depth + 1)


def resolve(reference: str, root: Json) -> Any:
    """What a JSON pointer inside `root` leads to; None when nothing is there or it points outside."""
    if not reference.startswith("#"):
        return None
    node: Any = root
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node


def _dicts(value: Any) -> list[Json]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _join(into: Json, other: Json, *, wins: bool = False) -> None:
    """Add another schema that also holds. `wins`: its plain words replace those already there."""
    for key, value in other.items():
        mine = into.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            into[key] = {**mine, **value}
        elif key == "required" and isinstance(mine, list) and isinstance(value, list):
            into[key] = [*mine, *(each for each in value if each not in mine)]
        elif wins or key not in into:
            into[key] = value


def _collapse(result: Json, branches: list[Json]) -> None:
    """One schema for alternatives: null becomes `nullable`, objects show the properties of all."""
    real = [branch for branch in branches if branch.get("type") != "null"]
    if len(real) < len(branches) or any(branch.get("nullable") for branch in real):
        result["nullable"] = True
    if not real:
        _join(result, {"type": "null"})
        return
    kinds = list(dict.fromkeys(str(branch["type"]) for branch in real if "type" in branch))
    merged = dict(real[0])
    for branch in real[1:]:
        if branch.get("type") == merged.get("type"):
            _widen(merged, branch)
    if len(kinds) > 1:
        merged["description"] = _with_note(merged.get("description"), f"May be {' or '.join(kinds)}.")
    _join(result, merged)


def _widen(merged: Json, other: Json) -> None:
    """Let `merged` also describe `other`, which has the same type."""
    required = [name for name in merged.get("required") or [] if name in (other.get("required") or [])]
    enums = [merged.get("enum"), other.get("enum")]
    for key in ("properties", "items"):
        if isinstance(merged.get(key), dict) and isinstance(other.get(key), dict):
            merged[key] = {**other[key], **merged[key]}
    if isinstance(enums[0], list) and isinstance(enums[1], list):
        merged["enum"] = [*enums[0], *(each for each in enums[1] if each not in enums[0])]
    else:
        merged.pop("enum", None)
    if "required" in merged:
        merged["required"] = required


def _plain_type(result: Json) -> Json:
    """`type` as one word, also where the schema leaves it to be concluded."""
    if "const" in result:
        result.setdefault("enum", [result.pop("const")])
    kinds = result.get("type")
    if isinstance(kinds, list):
        words = [kind for kind in kinds if isinstance(kind, str)]
        real = [kind for kind in words if kind != "null"]
        if len(real) < len(words):
            result["nullable"] = True
        result["type"] = real[0] if real else "null"
        if len(real) > 1:
            result["description"] = _with_note(result.get("description"), f"May be {' or '.join(real)}.")
    values = result.get("enum")
    if isinstance(values, list) and None in values:
        result["nullable"] = True
        values = result["enum"] = [value for value in values if value is not None]
    if "type" not in result:
        if "properties" in result:
            result["type"] = "object"
        elif "items" in result:
            result["type"] = "array"
        elif isinstance(values, list) and len({kind_of(value) for value in values}) == 1:
            result["type"] = kind_of(values[0])
    return result


def _with_note(description: Any, note: str) -> str:
    return f"{description} {note}" if isinstance(description, str) and description else note


def kind_of(value: Any) -> str:
    """JSON schema's word for the type of a JSON value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def typed(value: Any, schema: Any, root: Json) -> Any:
    """A value as the schema wants it, where that only takes another reading of the same text; else as it reads."""
    accepted = _alternatives(schema, root)
    if isinstance(value, dict):
        return {str(key): typed(each, _property(key, accepted), root) for key, each in value.items()}
    if isinstance(value, list):
        items: Any = next((each["items"] for each in accepted if isinstance(each.get("items"), dict)), {})
        return [typed(each, items, root) for each in value]
    if isinstance(value, str):
        return _typed_text(value, accepted, root, schema)
    return value


def _typed_text(text: str, accepted: list[Json], root: Json, schema: Any) -> Any:
    kinds = _kinds(accepted)
    plain = str(text)
    reading = natural(text.strip())
    listed = [each for node in accepted if isinstance(node.get("enum"), list) for each in node["enum"]]
    if plain in listed:
        return plain
    if isinstance(text, Bare) and not isinstance(reading, str):
        if not kinds or reading is None or "string" not in kinds:
            return _whole(reading, kinds)
        return _whole(reading, kinds) if _fits(reading, kinds) else plain
    if not kinds or "string" in kinds:
        return plain
    if not isinstance(reading, str) and _fits(reading, kinds):
        return _whole(reading, kinds)
    if plain.lstrip()[:1] in ("{", "[") and kinds & {"object", "array"}:
        try:
            inner = json.loads(plain)
            return typed(inner, schema, root) if kind_of(inner) in kinds else plain
        except (ValueError, RecursionError):
            return plain
    return plain


def natural(text: str) -> Any:
    """What a bare word says by itself: true, false, null, a number, or the text."""
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return text
    if text.lstrip("-").isdecimal():
        return int(text)
    value = float(text)
    return text if value in (float("inf"), float("-inf")) else value  # JSON has no infinity


def _fits(value: Any, kinds: frozenset[str]) -> bool:
    kind = kind_of(value)
    whole = isinstance(value, float) and value.is_integer()
    return kind in kinds or (kind == "integer" and "number" in kinds) or (whole and "integer" in kinds)


def _whole(value: Any, kinds: frozenset[str]) -> Any:
    """2.0 where only whole numbers are declared is 2."""
    is_whole = isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds
    return int(value) if is_whole else value


def _kinds(accepted: list[Json]) -> frozenset[str]:
    """Types the alternatives allow; empty when one of them allows anything."""
    kinds: set[str] = set()
    for node in accepted:
        declared = node.get("type")
        words = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
        if not words and isinstance(node.get("enum"), list):
            words = [kind_of(each) for each in node["enum"]]
        if not words and "const" in node:
            words = [kind_of(node["const"])]
        if not words and "properties" in node:
            words = ["object"]
        if not words:
            return frozenset()
        kinds.update(str(word) for word in words)
        if node.get("nullable") is True:
            kinds.add("null")
    return frozenset(kinds)


def _property(key: str, accepted: list[Json]) -> Any:
    for node in accepted:
        named = node.get("properties")
        if isinstance(named, dict) and key in named:
            return named[key]
    return next((node["additionalProperties"] for node in accepted if "additionalProperties" in node), {})


def _alternatives(schema: Any, root: Json) -> list[Json]:
    """The schemas a value may follow, references and alternatives opened. Each node is visited once."""
    found: list[Json] = []
    seen: set[int] = set()
    waiting = deque([schema])
    while waiting:
        node = waiting.popleft()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.get("$ref"), str):
            waiting.append(resolve(node["$ref"], root))
            continue
        inner = [part for word in ("anyOf", "oneOf", "allOf") for part in _dicts(node.get(word))]
        waiting += inner
        if not inner or node.keys() & {"type", "properties", "items", "enum", "const"}:
            found.append(node)
    return found
