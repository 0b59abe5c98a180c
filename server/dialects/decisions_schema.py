"""The body of OpenAI's `POST /v1/decisions`, as its SDK types it: what to judge, and questions with fixed answers.

Knows shapes, nothing of how a question is put to the model. Invariant: what this server cannot read (images) is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StrictBool, StrictStr, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.dialects.chat_schema import CallId
from server.dialects.responses_schema import OtherItem
from server.schema import BRANCH, OPEN, Seed, refuse

MAX_QUESTIONS = 400  # OpenAI's
MAX_CHOICES = 255  # OpenAI's
_TEXT_PARTS = ("input_text", "output_text", "text")


class Part(BaseModel):
    """One part of an input or of a question: text, or JSON that is shown as text."""

    model_config = OPEN
    type: str
    text: str | None = None
    refusal: str | None = None
    data: dict[str, Any] | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _only_text(self) -> Part:
        if self.type not in (*_TEXT_PARTS, "refusal", "input_json"):
            raise refuse(f"content part of type {self.type[:40]}", "is not supported yet: this server reads text only")
        field = {"refusal": "refusal", "input_json": "data"}.get(self.type, "text")
        if getattr(self, field) is None:
            context = {"type": self.type, "what": field}
            raise PydanticCustomError("missing", "a part of type '{type}' needs its {what}", context)
        return self

    @property
    def as_text(self) -> str:
        """The part as the model reads it."""
        if self.type == "input_json":
            return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return (self.refusal if self.type == "refusal" else self.text) or ""


def _kind(value: Any) -> str | None:
    return "str" if isinstance(value, str) else "list" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Part], Tag("list")],
    Discriminator(_kind, custom_error_type="content", custom_error_message="must be a string or a list of parts"),
]


class MessageItem(BaseModel):
    """A message of anybody."""

    model_config = OPEN
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(BaseModel):
    """A call of a function (`arguments`) or of a custom tool (`input`)."""

    model_config = OPEN
    type: Literal["function_call", "custom_tool_call"]
    call_id: CallId
    name: str
    arguments: str | None = None
    input: str | None = None

    @model_validator(mode="after")
    def _has_arguments(self) -> CallItem:
        field = "arguments" if self.type == "function_call" else "input"
        if getattr(self, field) is None:
            raise PydanticCustomError("missing", "a {type} needs its {what}", {"type": self.type, "what": field})
        return self


class ResultItem(BaseModel):
    """What a tool answered."""

    model_config = OPEN
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: CallId
    output: Content


_CALLS = {"function_call": "~call", "custom_tool_call": "~call"}
_ITEMS = {"message": "~message", **_CALLS, **{f"{name}_output": "~result" for name in _CALLS}}


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or ("message" if "role" in value else None)
    return _ITEMS.get(kind, f"{BRANCH}other") if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[CallItem, Tag("~call")]
    | Annotated[ResultItem, Tag("~result")]
    | Annotated[OtherItem, Tag("~other")],
    Discriminator(_item_kind, custom_error_type="item", custom_error_message="must be an object with a type or a role"),
]
Input = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Item], Tag("list")],
    Discriminator(_kind, custom_error_type="input", custom_error_message="must be a string or a list of items"),
]


class Choice(BaseModel):
    """One option of a choice. A string and a boolean with the same text are distinct."""

    model_config = OPEN
    value: StrictStr | StrictBool
    description: str | None = None


class Level(BaseModel):
    """One level of a score."""

    model_config = OPEN
    label: str
    description: str | None = None


class _Question(BaseModel):
    model_config = OPEN
    instructions: Content
    name: str | None = None

    @property
    def asked(self) -> str:
        """What is asked."""
        return text_of(self.instructions)


class Predicate(_Question):
    """How likely is it that a statement is true?"""

    type: Literal["predicate"]

    @property
    def options(self) -> list[tuple[str, str | None]]:
        """(text, description) of each possible answer, as the model reads them."""
        return [("false", None), ("true", None)]


class ChoiceQuestion(_Question):
    """Which of the options is it?"""

    type: Literal["choice"]
    choices: list[Choice] = Field(min_length=2, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _distinct(self) -> ChoiceQuestion:
        if len({(type(choice.value), choice.value) for choice in self.choices}) < len(self.choices):
            raise PydanticCustomError("invalid_value", "values must be distinct", {"field": "choices"})
        return self

    @property
    def options(self) -> list[tuple[str, str | None]]:
        """(text, description) of each possible answer, as the model reads them."""
        return [(json.dumps(choice.value, ensure_ascii=False), choice.description) for choice in self.choices]


class ScoreQuestion(_Question):
    """Where on an ordered scale is it?"""

    type: Literal["score"]
    levels: list[Level] = Field(min_length=2, max_length=MAX_CHOICES)

    @property
    def options(self) -> list[tuple[str, str | None]]:
        """(text, description) of each possible answer, as the model reads them."""
        return [(level.label, level.description) for level in self.levels]


def _question_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{BRANCH}{kind}" if kind in ("predicate", "choice", "score") else None


Question = Annotated[
    Annotated[Predicate, Tag("~predicate")]
    | Annotated[ChoiceQuestion, Tag("~choice")]
    | Annotated[ScoreQuestion, Tag("~score")],
    Discriminator(
        _question_kind, custom_error_type="question", custom_error_message="needs a type: predicate, choice or score"
    ),
]


class DecisionsRequest(BaseModel):
    """The whole body. `joint` and `seed` are extensions; cache hints and identifiers have no effect."""

    model_config = OPEN

    input: Input
    model: str | None = None
    questions: list[Question] = Field(min_length=1, max_length=MAX_QUESTIONS)
    joint: bool = False  # vLLM's: all questions on one canvas, answered by one pass
    seed: Seed = 0  # of the noise that the answers are read from

    @model_validator(mode="after")
    def _results_have_calls(self) -> DecisionsRequest:
        if isinstance(self.input, list):
            called: set[str] = set()
            for index, item in enumerate(self.input):
                if isinstance(item, CallItem):
                    called.add(item.call_id)
                elif isinstance(item, ResultItem) and item.call_id not in called:
                    context = {"field": "input", "index": index}
                    raise PydanticCustomError("invalid_value", "item {index} answers no call before it", context)
        return self

    @property
    def evidence(self) -> str:
        """The input as one text. Said by users only, it stands as it is; otherwise everybody is named."""
        if isinstance(self.input, str):
            return self.input
        if all(isinstance(item, MessageItem) and item.role == "user" for item in self.input):
            return "\n\n".join(text_of(item.content) for item in self.input if isinstance(item, MessageItem))
        return "\n\n".join(_lines(self.input))


def _lines(items: Iterable[MessageItem | CallItem | ResultItem | OtherItem]) -> Iterable[str]:
    for item in items:
        if isinstance(item, MessageItem):
            yield f"{item.role.capitalize()}: {text_of(item.content)}"
        elif isinstance(item, CallItem):
            given = item.arguments if item.arguments is not None else item.input
            yield f"Call of {item.name}: {given}"
        elif isinstance(item, ResultItem):
            yield f"Result: {text_of(item.output)}"


def text_of(content: str | list[Part]) -> str:
    """Content as text: parts are paragraphs of it."""
    return content if isinstance(content, str) else "\n".join(part.as_text for part in content)
