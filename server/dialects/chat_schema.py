"""The body of `POST /v1/chat/completions` as OpenAI's clients send it, checked field by field.

Its messages and tools are also those of `/apply-template` and `/tokenize`. Knows shapes, not templates or replies.
Invariant: everything declared here is honoured; what is not, `server.schema` refuses by name or drops as harmless.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.dialects.image_parts import url_of
from server.dialects.structure_schema import ResponseFormatFields, ToolChoice, read_tool_choice
from server.schema import (
    OPEN,
    UNSUPPORTED,
    EaselOptions,
    SamplingFields,
    TokenLimit,
    TopLogprobs,
    parse,
    refuse,
    refuse_unbuilt,
)


class ContentPart(BaseModel):
    """One part of a message's content: text (a refusal the model once gave is text) or an image."""

    model_config = OPEN
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None

    @model_validator(mode="after")
    def _check_kind(self) -> ContentPart:
        if self.type == "image_url":
            url_of(self.image_url)
            return self
        if self.type not in ("text", "refusal"):
            raise refuse(
                f"content part of type {self.type[:40]}", "is not supported yet: this server reads text and images only"
            )
        if self.as_text is None:
            raise PydanticCustomError("missing", "a content part of type '{type}' needs its text", {"type": self.type})
        return self

    @property
    def image(self) -> str | None:
        """The address of an image, which should be a data: URL."""
        return url_of(self.image_url) if self.type == "image_url" else None

    @property
    def as_text(self) -> str | None:
        """The part's text."""
        return self.text if self.type == "text" else self.refusal


def _content_kind(value: Any) -> str | None:
    # With a plain union a fault in a part would be reported once per branch, the misleading one first.
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[ContentPart], Tag("list")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of content parts",
    ),
]


def as_result(value: object) -> object:
    """A tool's result as text or parts: some frameworks send it as JSON, of which the model reads the text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(each, dict) and "type" in each for each in value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _id_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


CallId = Annotated[str, BeforeValidator(_id_text)]


class SystemMessage(BaseModel):
    """Instructions; `developer` is OpenAI's newer name for the same thing."""

    model_config = OPEN
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(BaseModel):
    """What the person said."""

    model_config = OPEN
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(BaseModel):
    """The function part of a call in the history. Clients send the arguments as JSON text, some as an object."""

    model_config = OPEN
    name: str
    arguments: str | dict[str, Any] | None = None


class HistoryToolCall(BaseModel):
    """A call the assistant made earlier."""

    model_config = OPEN
    id: CallId | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """An earlier reply, with its calls and, where the client kept it, its reasoning."""

    model_config = OPEN
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
                    old = "is OpenAI's retired form of tool calls: send 'tool_calls'" if name == "function_call" else ""
                    raise refuse(name, old or "is not supported yet")
        return data


class ToolMessage(BaseModel):
    """The result of a call."""

    model_config = OPEN
    role: Literal["tool"]
    content: Annotated[Content, BeforeValidator(as_result)]
    tool_call_id: CallId | None = None
    name: str | None = None


class FunctionMessage(BaseModel):
    """OpenAI's first form of a tool's result, which has no id to match it by."""

    model_config = OPEN
    role: Literal["function"]
    content: Any = None
    name: Any = None

    @model_validator(mode="after")
    def _refuse(self) -> FunctionMessage:
        raise refuse("role", "'function' is OpenAI's retired form of a tool's result: send role 'tool'")


_TAGS = {"developer": "system", "function": "~function"} | {
    role: role for role in ("system", "user", "assistant", "tool")
}


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return _TAGS.get(role) if isinstance(role, str) else None


Message = Annotated[
    Annotated[SystemMessage, Tag("system")]
    | Annotated[UserMessage, Tag("user")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")]
    | Annotated[FunctionMessage, Tag("~function")],
    Discriminator(
        _role, custom_error_type="role", custom_error_message="needs a role: system, developer, user, assistant or tool"
    ),
]


class FunctionDefinition(BaseModel):
    """A function the model may call; `parameters` is a JSON schema."""

    model_config = OPEN
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A declared tool."""

    model_config = OPEN
    type: str
    function: FunctionDefinition | None = None

    @model_validator(mode="after")
    def _only_functions(self) -> Tool:
        if self.type != "function":
            raise refuse(f"tool of type {self.type[:40]}", "is not supported yet: only function tools are")
        if self.function is None:
            raise PydanticCustomError("missing", "a tool of type 'function' needs its function")
        return self


class ChatEaselOptions(EaselOptions):
    """`easel` in a chat: what is read here can also be watched."""

    drafts: Annotated[bool, Field(strict=True)] | None = None


class ChatRequest(SamplingFields, ResponseFormatFields):
    """The request body. Everything declared here is honoured; see the module docstring for the rest."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    easel: ChatEaselOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        refuse_unbuilt(data, UNSUPPORTED)
        return data

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid_value", "needs 'logprobs' to be true", {"field": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_drafts(self) -> ChatRequest:
        if self.drafts and not self.stream:
            raise PydanticCustomError("invalid_value", "'drafts' needs 'stream' to be true", {"field": "easel"})
        return self

    @property
    def drafts(self) -> bool:
        """Whether the canvases are to be shown while they are denoised."""
        return self.easel is not None and bool(self.easel.drafts)

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ChatRequest:
        self.choice()
        return self

    def choice(self) -> ToolChoice:
        """Which tools may be called, and whether one must be."""
        return read_tool_choice(self.tool_choice, [tool.function.name for tool in self.tools or () if tool.function])


def parse_chat_request(body: bytes) -> ChatRequest:
    """Check a request body. Raises ApiError (400) naming the first field at fault."""
    return parse(ChatRequest, body)
