"""The body of `POST /v1/chat/completions` as OpenAI's clients send it, checked field by field.

Knows shapes and ranges, not models, prompts or replies. Three kinds of fields: honoured (declared below), hints and
extras that cannot change the reply (accepted, dropped) and fields that would change it but are not built
(`_UNSUPPORTED`). Invariant: a field of the third kind is a 400 that names it, unless its value means "off".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from server.errors import ApiError, invalid

MAX_REPORTED_ERRORS = 10
MAX_MESSAGE_CHARACTERS = 300
_OPEN = ConfigDict(extra="allow", frozen=True)


def _refuse(field: str, detail: str = "is not supported yet") -> PydanticCustomError:
    # The field's name goes in as context, not as template text: it may contain braces.
    return PydanticCustomError("unsupported_value", "'{field}' {detail}", {"field": field, "detail": detail})


class TextPart(BaseModel):
    """One part of a message's content. Only text parts (and a refusal the model once gave) are text."""

    model_config = _OPEN
    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _only_text(self) -> TextPart:
        if self.type not in ("text", "refusal"):
            raise _refuse(f"content part of type {self.type[:40]}", "is not supported yet: this server reads text only")
        if self.as_text is None:
            raise PydanticCustomError("missing", "a content part of type '{type}' needs its text", {"type": self.type})
        return self

    @property
    def as_text(self) -> str | None:
        """The part's text."""
        return self.text if self.type == "text" else self.refusal


def _content_kind(value: Any) -> str | None:
    # With a plain union a fault in a part would be reported once per branch, the misleading one first.
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[TextPart], Tag("list")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of content parts",
    ),
]


def _json_text(value: object) -> object:
    # Some frameworks send a tool's result as an object; what the model reads is its JSON text.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class SystemMessage(BaseModel):
    """Instructions; `developer` is OpenAI's newer name for the same thing."""

    model_config = _OPEN
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(BaseModel):
    """What the person said."""

    model_config = _OPEN
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(BaseModel):
    """The function part of a call in the history. Clients send the arguments as JSON text, some as an object."""

    model_config = _OPEN
    name: str
    arguments: str | dict[str, Any] | None = None


class HistoryToolCall(BaseModel):
    """A call the assistant made earlier."""

    model_config = _OPEN
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """An earlier reply, with its calls and, where the client kept it, its reasoning."""

    model_config = _OPEN
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[HistoryToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_forms(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("function_call", "audio"):
                if data.get(name):
                    raise _refuse(name)
        return data


class ToolMessage(BaseModel):
    """The result of a call."""

    model_config = _OPEN
    role: Literal["tool"]
    content: Annotated[Content, BeforeValidator(_json_text)]
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(BaseModel):
    """A function the model may call; `parameters` is a JSON schema."""

    model_config = _OPEN
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _no_guarantee_yet(self) -> FunctionDefinition:
        if self.strict:
            raise _refuse("strict", "is not supported yet: arguments are not constrained to the schema")
        return self


class Tool(BaseModel):
    """A declared tool."""

    model_config = _OPEN
    type: str
    function: FunctionDefinition | None = None

    @model_validator(mode="after")
    def _only_functions(self) -> Tool:
        if self.type != "function":
            raise _refuse(f"tool of type {self.type[:40]}", "is not supported yet: only function tools are")
        if self.function is None:
            raise PydanticCustomError("missing", "a tool of type 'function' needs its function")
        return self


class StreamOptions(BaseModel):
    """Only `include_usage` changes anything here; obfuscation is padding this server does not add."""

    model_config = _OPEN
    include_usage: bool | None = None


def _is(*values: object) -> Callable[[Any], bool]:
    """A test for 'this value means off'; null and empty always do."""
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def _zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "logprobs": _is(False),
    "top_logprobs": _zero,
    "prompt_logprobs": _zero,
    "frequency_penalty": _zero,
    "presence_penalty": _zero,
    "repetition_penalty": _one,
    "length_penalty": _one,
    "min_p": _zero,
    "typical_p": _one,
    "min_tokens": _zero,
    "logit_bias": _is(),
    "bad_words": _is(),
    "allowed_token_ids": _is(),
    "stop_token_ids": _is(),
    "ignore_eos": _is(False),
    "use_beam_search": _is(False),
    "best_of": _one,
    "echo": _is(False),
    "suffix": _is(""),
    "functions": _is(),
    "function_call": _is("none", "auto"),
    "audio": _is(),
    "modalities": _is(["text"]),
    "web_search_options": _is(),
    "moderation": _is(),
    "structured_outputs": _is(),
    "guided_json": _is(),
    "guided_regex": _is(),
    "guided_choice": _is(),
    "guided_grammar": _is(),
    "grammar": _is(),
    "json_schema": _is(),
    "regex": _is(),
    "chat_template": _is(),
    "documents": _is(),
    "continue_final_message": _is(False),
    "add_generation_prompt": _is(True),
    "include_reasoning": _is(True),
}

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64, strict=True)]
TokenLimit = Annotated[int, Field(ge=1, strict=True)]
StopString = Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """The request body. Everything declared here is honoured; see the module docstring for the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=-1, lt=2**31, strict=True)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=8, strict=True)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, means_off in _UNSUPPORTED.items():
                value = data.get(name)
                if value is None or value == [] or value == {} or means_off(value):
                    continue
                raise _refuse(name)
        return data

    @model_validator(mode="after")
    def _refuse_forced_tools(self) -> ChatRequest:
        if self.tool_choice is not None and self.tool_choice not in ("auto", "none"):
            raise _refuse(
                "tool_choice", "is supported as 'auto' and 'none' only, not yet as 'required' or a named tool"
            )
        return self

    @model_validator(mode="after")
    def _check_stop(self) -> ChatRequest:
        if len(self.stop_strings) > 4:
            raise PydanticCustomError("invalid_value", "takes at most 4 strings", {"field": "stop"})
        if "" in self.stop_strings:
            raise PydanticCustomError("invalid_value", "strings must not be empty", {"field": "stop"})
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whichever form they came in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Check a request body. Raises ApiError (400) naming the first field at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from error


def _as_api_error(error: ValidationError) -> ApiError:
    faults = error.errors(include_url=False, include_context=True, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    lines = []
    # Bounded: an answer must not grow with what was sent.
    for fault in faults[:MAX_REPORTED_ERRORS]:
        where = _where(fault)
        lines.append(f"{where}: {fault['msg']}"[:MAX_MESSAGE_CHARACTERS] if where else fault["msg"])
    code = {"missing": "missing_required_parameter", "unsupported_value": "unsupported_value"}.get(first["type"])
    return invalid("; ".join(lines), param=_where(first) or None, code=code or "invalid_value")


def _where(fault: ErrorDetails) -> str:
    """The field at fault: its path, and the name a validator of the whole object put in."""
    path, named = _path(fault["loc"]), str(fault.get("ctx", {}).get("field", ""))
    if not named.isidentifier():
        return path
    return f"{path}.{named}" if path else named


# pydantic also reports which branch of a union it tried: no part of the client's document
_BRANCHES = frozenset({"system", "developer", "user", "assistant", "tool", "str", "list", "list[str]", "dict[str,any]"})


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "user", "content", "list", 1)` -> `messages[0].content[1]`."""
    path = ""
    for position, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif position > 0 and part in _BRANCHES:
            continue
        else:
            path += f".{part}" if path else str(part)
    return path
