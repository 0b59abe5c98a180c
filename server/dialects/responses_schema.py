"""The body of OpenAI's `POST /v1/responses`, checked and translated.

Its input is a list of items: messages, calls, results and thoughts, each on its own. Knows their shapes, nothing of
replies or of earlier responses. Invariant: what cannot be honoured is refused by name, as in every other format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from server.dialects.chat_schema import CallId, as_result
from server.dialects.history import Content as Shown
from server.dialects.history import History
from server.dialects.image_parts import url_of
from server.dialects.structure_schema import GuidedFields, ToolChoice, read_format, read_tool_choice
from server.exchange import Structure
from server.images import image_part, misplaced, shown
from server.schema import (
    BRANCH,
    OPEN,
    UNSUPPORTED,
    DrawFields,
    MeansOff,
    TokenLimit,
    TopLogprobs,
    off,
    refuse,
    refuse_unbuilt,
)

Json = dict[str, Any]

_UNSUPPORTED: Mapping[str, MeansOff] = {
    **UNSUPPORTED,
    "logprobs": off(False),
    "response_format": off(),
    "background": off(False),
    "conversation": off(),
    "prompt": off(),
    "context_management": off(),
    "stop": off(),
}
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


class Part(BaseModel):
    """One part of an item's content."""

    model_config = OPEN
    type: str
    text: str = ""
    refusal: str = ""
    image_url: Any = None

    @model_validator(mode="after")
    def _check_kind(self) -> Part:
        if self.type == "input_image":
            url_of(self.image_url)
        elif self.type not in _TEXT_PARTS:
            raise refuse(
                f"content part of type {self.type[:40]}", "is not supported yet: this server reads text and images only"
            )
        return self


def _content_kind(value: Any) -> str | None:
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Part], Tag("list")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of content parts",
    ),
]


class MessageItem(BaseModel):
    """A message of anybody."""

    model_config = OPEN
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(BaseModel):
    """A call the assistant made."""

    model_config = OPEN
    type: Literal["function_call"]
    call_id: CallId
    name: str
    arguments: str


class ResultItem(BaseModel):
    """What a tool answered."""

    model_config = OPEN
    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[Content, BeforeValidator(as_result)]


class ReasoningItem(BaseModel):
    """A thought of an earlier reply."""

    model_config = OPEN
    type: Literal["reasoning"]
    content: list[Part] | None = None
    summary: list[Part] | None = None


class OtherItem(BaseModel):
    """An item of any other type, a reference to an earlier one among them."""

    model_config = OPEN
    type: str

    @model_validator(mode="after")
    def _refuse(self) -> OtherItem:
        raise refuse(f"item of type {self.type[:40]}", "is not supported")


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or ("message" if "role" in value else None)
    if not isinstance(kind, str):
        return None
    return f"{BRANCH}{kind}" if kind in _ITEMS else "~other"


Item = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[CallItem, Tag("~function_call")]
    | Annotated[ResultItem, Tag("~function_call_output")]
    | Annotated[ReasoningItem, Tag("~reasoning")]
    | Annotated[OtherItem, Tag("~other")],
    Discriminator(_item_kind, custom_error_type="item", custom_error_message="must be an object with a type or a role"),
]


def _input_kind(value: Any) -> str | None:
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Item], Tag("list")],
    Discriminator(_input_kind, custom_error_type="input", custom_error_message="must be a string or a list of items"),
]


class FunctionTool(BaseModel):
    """A tool, described flat."""

    model_config = OPEN
    type: str
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _only_functions(self) -> FunctionTool:
        if self.type != "function":
            raise refuse(f"tool of type {self.type[:40]}", "is not supported: only function tools are")
        if not self.name:
            raise refuse("name", "is missing")
        return self

    def for_task(self) -> Json:
        """In the form of chat completions."""
        function: Json = {"name": self.name, "parameters": self.parameters or {}}
        if self.description is not None:
            function["description"] = self.description
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": function}

    def echoed(self) -> Json:
        """As the response repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class Reasoning(BaseModel):
    """Whether the model thinks; thoughts are given out whole, so a wish for a summary has no effect."""

    model_config = OPEN
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


class TextOptions(BaseModel):
    """The form of the text."""

    model_config = OPEN
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_format(self) -> TextOptions:
        read_format("format", self.format)
        return self


class ResponsesRequest(DrawFields, GuidedFields):
    """The whole body."""

    input: Input
    instructions: str | None = None
    model: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: TokenLimit | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    store: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    max_tool_calls: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        refuse_unbuilt(data, _UNSUPPORTED)
        return data

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ResponsesRequest:
        self.choice()
        return self

    def choice(self) -> ToolChoice:
        """Which tools may be called, and whether one must be."""
        return read_tool_choice(self.tool_choice, [tool.name for tool in self.tools or ()])

    def own_format(self) -> Structure | None:
        """The form of the text that `text.format` asks for."""
        return read_format("text.format", self.text.format) if self.text is not None else None

    @property
    def logprobs(self) -> int | None:
        """How many likeliest tokens to report for each token of the text; None = nothing."""
        asked = "message.output_text.logprobs" in (self.include or ()) or self.top_logprobs
        return (self.top_logprobs or 0) if asked else None


def add_input(history: History, given: str | list[Item]) -> None:
    """Add the input of a request to a conversation."""
    if isinstance(given, str):
        history.say("user", given)
        return
    for index, item in enumerate(given):
        param = f"input[{index}].content"
        if isinstance(item, CallItem):
            history.call(item.call_id, item.name, item.arguments)
        elif isinstance(item, ResultItem):
            history.result(item.call_id, _content(item.output, f"input[{index}].output"))
        elif isinstance(item, ReasoningItem):
            history.continue_answer(reasoning=_text(item.content or item.summary or [], param))
        elif isinstance(item, MessageItem) and item.role == "assistant":
            history.continue_answer(text=_text(item.content, param))
        elif isinstance(item, MessageItem) and item.role == "user":
            history.say(item.role, _content(item.content, param))
        elif isinstance(item, MessageItem):
            history.say(item.role, _text(item.content, param))


def add_output(history: History, items: Iterable[Json]) -> None:
    """Add what a response gave out, for the one that goes on from it."""
    for item in items:
        if item["type"] == "function_call":
            history.call(item["call_id"], item["name"], item["arguments"])
            continue
        text = "\n".join(part["text"] for part in item["content"])
        if item["type"] == "reasoning":
            history.continue_answer(reasoning=text)
        else:
            history.continue_answer(text=text)


def _content(content: str | list[Part], param: str) -> Shown:
    """The content of a message, images in their places."""
    if isinstance(content, str):
        return content
    return shown(
        [
            image_part(url_of(part.image_url), f"{param}[{index}]")
            if part.type == "input_image"
            else {"type": "text", "text": part.refusal if part.type == "refusal" else part.text}
            for index, part in enumerate(content)
        ]
    )


def _text(content: str | list[Part], param: str) -> str:
    """The text where there are no images. Raises ApiError (400)."""
    text = _content(content, param)
    if isinstance(text, str):
        return text
    raise misplaced(text)
