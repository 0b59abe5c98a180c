"""The body of Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`, checked and translated.

Knows Anthropic's messages, parts and tools, nothing of replies. Cache hints, metadata, betas and a thinking budget
change nothing in the text and are dropped; what would change it and is not built is refused by name.
Invariant: every part of the history that has text or an image reaches the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.dialects.history import Content as Shown
from server.dialects.history import History
from server.dialects.image_parts import data_of
from server.dialects.structure_schema import ToolChoice, read_format, read_tool_choice
from server.exchange import ChatTask, Structure
from server.images import image_part, misplaced, shown
from server.schema import (
    BRANCH,
    OPEN,
    EaselOptions,
    MeansOff,
    TokenLimit,
    check_stop_strings,
    draw,
    off,
    refuse,
    refuse_unbuilt,
    schedule,
)

Json = dict[str, Any]

_UNSUPPORTED: Mapping[str, MeansOff] = {
    "mcp_servers": off(),
    "container": off(),
    "logprobs": off(False),
}
_KNOWN = ("text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result")


class _Part(BaseModel):
    model_config = OPEN


class TextPart(_Part):
    """Plain text."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """An image."""

    type: Literal["image"]
    source: Any = None

    @model_validator(mode="after")
    def _check_source(self) -> ImagePart:
        data_of(self.source)
        return self


class ThinkingPart(_Part):
    """A thought of an earlier reply, as this server gave it out."""

    type: Literal["thinking"]
    thinking: str


class DroppedPart(_Part):
    """A part that is unreadable to anybody but who wrote it."""

    type: Literal["redacted_thinking"]


class ToolUsePart(_Part):
    """A call the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultPart(_Part):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Content | None = None
    is_error: bool | None = None


class OtherPart(_Part):
    """A part of any other type."""

    type: str

    @model_validator(mode="after")
    def _refuse(self) -> OtherPart:
        raise refuse(
            f"content part of type {self.type[:40]}", "is not supported yet: this server reads text and images only"
        )


def _part_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(kind, str):
        return None
    return f"{BRANCH}{kind}" if kind in _KNOWN else "~other"


def _content_kind(value: Any) -> str | None:
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[ImagePart, Tag("~image")]
    | Annotated[ThinkingPart, Tag("~thinking")]
    | Annotated[DroppedPart, Tag("~redacted_thinking")]
    | Annotated[ToolUsePart, Tag("~tool_use")]
    | Annotated[ToolResultPart, Tag("~tool_result")]
    | Annotated[OtherPart, Tag("~other")],
    Discriminator(_part_kind, custom_error_type="part", custom_error_message="must be an object with a type"),
]
Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Part], Tag("list")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of content parts",
    ),
]
ToolResultPart.model_rebuild()


class AnthropicMessage(BaseModel):
    """One turn. Newer clients also send instructions in the middle, as role system."""

    model_config = OPEN
    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicTool(BaseModel):
    """A tool of the client's own. Anthropic's server-side tools have types of their own and are refused."""

    model_config = OPEN
    type: str | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_own_tools(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise refuse(f"tool of type {kind[:40]}", "is not supported: only tools the client runs are")
        return data

    @model_validator(mode="after")
    def _check_schema(self) -> AnthropicTool:
        if self.input_schema is None:
            raise PydanticCustomError("missing", "a tool needs its input_schema")
        return self


class AnthropicToolChoice(BaseModel):
    """Whether a tool may or must be called."""

    model_config = OPEN
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_openai(self) -> Any:
        """The same in the words of chat completions."""
        if self.type == "tool":
            return {"type": "function", "name": self.name}
        return "required" if self.type == "any" else self.type


class Thinking(BaseModel):
    """Whether the model thinks first. How long is up to it: a budget is a hint."""

    model_config = OPEN
    type: Literal["enabled", "disabled", "adaptive"]


class OutputConfig(BaseModel):
    """Effort is a hint; a format is a guarantee."""

    model_config = OPEN
    format: Any = None

    @model_validator(mode="after")
    def _check_format(self) -> OutputConfig:
        read_format("format", self.format)
        return self


class CountRequest(BaseModel):
    """The part of the body that makes the prompt."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Content | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        refuse_unbuilt(data, _UNSUPPORTED)
        return data

    @model_validator(mode="after")
    def _check_tool_choice(self) -> CountRequest:
        self.choice()
        return self

    def choice(self) -> ToolChoice:
        """Which tools may be called, and whether one must be."""
        asked = None if self.tool_choice is None else self.tool_choice.as_openai()
        return read_tool_choice(asked, [tool.name for tool in self.tools or ()])

    def prompt(self) -> Json:
        """The fields of a `ChatTask` that make the prompt."""
        choice = self.tool_choice
        tools = [] if self.choice().hides_tools else self.tools or []
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        return {
            "messages": _history(self.system, self.messages),
            "tools": tuple(_tool(tool) for tool in tools),
            "template_options": {"enable_thinking": thinks},
            "model": self.model,
            "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
        }


class MessagesRequest(CountRequest):
    """The whole body."""

    max_tokens: TokenLimit
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=0, lt=2**31, strict=True)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
    output_format: Any = None  # what output_config.format was called before
    easel: EaselOptions | None = None

    @model_validator(mode="after")
    def _check_stop(self) -> MessagesRequest:
        check_stop_strings("stop_sequences", tuple(self.stop_sequences or ()))
        return self

    @model_validator(mode="after")
    def _check_structure(self) -> MessagesRequest:
        self.structure()
        return self

    @model_validator(mode="after")
    def _check_prefill(self) -> MessagesRequest:
        if self.messages[-1].role == "assistant":
            raise refuse("messages", "must end with the user's: the beginning of a reply cannot be given here")
        return self

    def structure(self) -> Structure | None:
        """The form asked for."""
        new = read_format("output_config.format", self.output_config.format) if self.output_config else None
        return new or read_format("output_format", self.output_format)

    def task(self) -> ChatTask:
        """The request without its wire detail."""
        return ChatTask(
            **self.prompt(),
            **self.choice().for_task(),
            structure=self.structure(),
            **draw(self.temperature, self.top_p, self.top_k),
            schedule=schedule(self.easel),
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
        )


def _tool(tool: AnthropicTool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _history(system: Content | None, messages: list[AnthropicMessage]) -> tuple[Json, ...]:
    history = History()
    if system:
        history.say("system", _text(system, "system"))
    for index, message in enumerate(messages):
        content, param = message.content, f"messages[{index}].content"
        parts: list[Part] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        if message.role == "assistant":
            _answer(history, parts, param)
            continue
        for place, part in enumerate(parts):
            if isinstance(part, ToolResultPart):
                history.result(part.tool_use_id, _result(part, f"{param}[{place}].content"))
        said = _text(parts, param) if message.role == "system" else _content(parts, param)
        if said or not any(isinstance(part, ToolResultPart) for part in parts):
            history.say(message.role, said)
    return tuple(history.messages)


def _answer(history: History, parts: list[Part], param: str) -> None:
    thoughts = "\n".join(part.thinking for part in parts if isinstance(part, ThinkingPart))
    history.answer(_text(parts, param), reasoning=thoughts)
    for part in parts:
        if isinstance(part, ToolUsePart):
            history.call(part.id, part.name, part.input)


def _result(part: ToolResultPart, param: str) -> Shown:
    content = _content(part.content or "", param)
    if not part.is_error:
        return content
    if isinstance(content, str):
        return f"Error: {content}"
    return [{"type": "text", "text": "Error:"}, *content]


def _content(content: Content, param: str) -> Shown:
    """Text and images in their order; whatever else there is, is not for the template's content."""
    if isinstance(content, str):
        return content
    parts: list[Mapping[str, Any]] = []
    for index, part in enumerate(content):
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            parts.append(image_part(data_of(part.source), f"{param}[{index}]"))
    return shown(parts)


def _text(content: Content, param: str) -> str:
    """The text where there are no images. Raises ApiError (400)."""
    text = _content(content, param)
    if isinstance(text, str):
        return text
    raise misplaced(text)
