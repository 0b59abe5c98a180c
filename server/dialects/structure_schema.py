"""The fields that ask for a form of the content, in the words of OpenAI, vLLM and llama.cpp; and `tool_choice`.

Knows these fields' shapes, nothing of schemas and grammars themselves: those are compiled later and refused then.
Invariant: a body asks for one form at most, and for a tool only by a name it declares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from server.exchange import Structure
from server.schema import refuse

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
_LLAMA_CPP = ("grammar", "json_schema", "regex")
_FORMS = ("json", "json_object", "regex", "choice", "grammar")  # of structured_outputs


class GuidedFields(BaseModel):
    """What vLLM's and llama.cpp's clients send, older and newer names."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    grammar: Any = None
    json_schema: Any = None
    regex: Any = None

    @model_validator(mode="after")
    def _check_structure(self) -> GuidedFields:
        self.structure()
        return self

    def structure(self) -> Structure | None:
        """The form asked for, whichever field it came in."""
        forms = [(name, form) for name in (*_GUIDED, *_LLAMA_CPP) if _is_set(form := getattr(self, name))]
        own = self.own_format()
        asked = [_guided(name, form) for name, form in forms] + ([own] if own is not None else [])
        if len(asked) > 1:
            raise _invalid(asked[1].param, f"cannot stand beside '{asked[0].param}': one form of the content at a time")
        return asked[0] if asked else None

    def own_format(self) -> Structure | None:
        """The form asked for in the wire format's own field."""
        return None


class ResponseFormatFields(GuidedFields):
    """The same, and OpenAI's `response_format`."""

    response_format: Any = None

    def own_format(self) -> Structure | None:
        return read_format("response_format", self.response_format)


def read_format(param: str, value: Any) -> Structure | None:
    """OpenAI's description of a format, flat (responses, Anthropic) or nested (chat). Raises inside a validator."""
    if not _is_set(value):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise _invalid(param, "must be an object with a type")
    kind = value["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's
        return Structure("json", schema if _is_set(schema) else {"type": "object"}, param)
    if kind == "json_schema":
        nested = value.get("json_schema", value)
        schema = nested.get("schema") if isinstance(nested, dict) else None
        if not isinstance(schema, dict | bool):
            raise _invalid(param, "of type 'json_schema' needs a schema")
        return Structure("json", schema, param)
    raise refuse(param, f"of type '{kind[:40]}' is not supported: text, json_object and json_schema are")


def _guided(name: str, value: Any) -> Structure:
    if name == "structured_outputs":
        return _structured_outputs(value)
    if name in ("guided_json", "json_schema"):
        return _json(name, value)
    if name == "guided_choice":
        return _choice(name, value)
    text = _text(name, value)
    if name in ("guided_regex", "regex"):
        return Structure("regex", text, name)
    return Structure("gbnf", text, name) if name == "grammar" else _grammar(name, text)


def _structured_outputs(value: Any) -> Structure:
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise _invalid(param, "must be an object")
    if _is_set(value.get("structural_tag")):
        raise refuse(param, "with 'structural_tag' is not supported: tools with tool_choice are")
    set_forms = [form for form in _FORMS if _is_set(value.get(form)) and value[form] is not False]
    if len(set_forms) != 1:
        raise _invalid(param, f"must have one of {', '.join(_FORMS)}")
    (form,) = set_forms
    if form == "json":
        return _json(param, value[form])
    if form == "json_object":
        return Structure("json", {"type": "object"}, param)
    if form == "choice":
        return _choice(param, value[form])
    text = _text(param, value[form])
    return Structure("regex", text, param) if form == "regex" else _grammar(param, text)


def _json(param: str, value: Any) -> Structure:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _invalid(param, f"is no JSON: {error}"[:200]) from error
    if not isinstance(value, dict | bool):
        raise _invalid(param, "must be a JSON schema")
    return Structure("json", value, param)


def _choice(param: str, value: Any) -> Structure:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise _invalid(param, "must be a list of texts")
    return Structure("choice", tuple(dict.fromkeys(value)), param)


def _grammar(param: str, text: str) -> Structure:
    return Structure("gbnf" if "::=" in text else "lark", text, param)


def _text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid(param, "must be a text")
    return value


def _is_set(value: Any) -> bool:
    return value not in (None, "", [], {}) or value is False


def _invalid(param: str, problem: str) -> PydanticCustomError:
    # Nothing of the client's may be read as a template.
    return PydanticCustomError("invalid_value", "'{field}' {problem}", {"field": param, "problem": problem})


@dataclass(frozen=True)
class ToolChoice:
    """Which tools may be called, and whether one must be. `names` None: all of them."""

    names: tuple[str, ...] | None = None
    must_call: bool = False

    @property
    def hides_tools(self) -> bool:
        """Whether the reply is to be as if there were no tools."""
        return self.names == ()

    def for_task(self) -> dict[str, Any]:
        """As `ChatTask` wants it."""
        return {"must_call": self.must_call, "callable": None if self.hides_tools else self.names}


def read_tool_choice(value: Any, declared: Sequence[str]) -> ToolChoice:
    """`tool_choice` as chat completions and responses have it. Raises inside a validator."""
    choice = _tool_choice(value)
    if choice.must_call and not declared:
        raise _invalid("tool_choice", "asks for a call, but there are no 'tools'")
    unknown = [name for name in choice.names or () if name not in declared]
    if unknown:
        raise _invalid("tool_choice", f"names a tool that is not declared: {unknown[0][:64]}")
    return choice


def _tool_choice(value: Any) -> ToolChoice:
    if value is None or value == "auto":
        return ToolChoice()
    if value == "none":
        return ToolChoice(names=())
    if value == "required":
        return ToolChoice(must_call=True)
    if isinstance(value, Mapping) and value.get("type") == "function":
        return ToolChoice(names=(_named(value),), must_call=True)
    if isinstance(value, Mapping) and value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if not isinstance(tools, list) or not tools or allowed.get("mode") not in ("auto", "required"):
            raise _invalid("tool_choice", "of type 'allowed_tools' needs a mode, auto or required, and tools")
        return ToolChoice(names=tuple(map(_named, tools)), must_call=allowed["mode"] == "required")
    raise refuse("tool_choice", "is supported as auto, none, required, a function, or allowed_tools")


def _named(value: Any) -> str:
    nested = value.get("function", value) if isinstance(value, Mapping) else None
    name = nested.get("name") if isinstance(nested, Mapping) else None
    if not isinstance(name, str):
        raise _invalid("tool_choice", "needs the name of a function")
    return name
