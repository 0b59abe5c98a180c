"""What every wire format is translated to and from: one internal request, one internal stream.

Knows no HTTP, no wire format, no tokenizer and no engine call (only the engine's word for how to denoise). A wire
format is an adapter that builds a `ChatTask` and renders `Delta`s and `ReplyDone`; nothing else in the server has to
change for a new one.
Invariant: a stream is any number of `Delta`s, then one `ChoiceDone` per choice, then one `ReplyDone`. Only who
watches a reply sees `Draft`s between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine import Schedule

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Structure:
    """The form that the content of a reply must have. `value` is a JSON schema, a regular expression, a tuple of
    texts to choose from, or a grammar in Lark's or llama.cpp's (GBNF) syntax; `param` is the field it came in."""

    kind: Literal["json", "regex", "choice", "lark", "gbnf"]
    value: Any
    param: str


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """One request for text, checked and free of wire detail.

    `messages` are plain dicts in the form chat templates read: `content` is a string (where there are images, what
    `server.images.shown` makes of them), tool-call arguments are objects, a tool result carries the name of its tool.
    `tools` are in OpenAI's form, with the schemas as the client wrote them. Instead of messages there may be `prompts`,
    text or token ids that no template touches.
    `None` in an option means "not asked for".
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    suffix: str | None = None  # what comes behind the text: then there is a gap to fill; with `prompts` only
    echo: bool = False  # begin each choice with the prompt it continues; of `prompts` only
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)  # e.g. enable_thinking
    model: str | None = None
    max_tokens: int | None = None  # None: what is left of the context
    temperature: float = 1.0
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    logprobs: int | None = None  # how many likeliest tokens to report for each token of the content; None = nothing
    seed: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1  # per prompt
    parallel_tool_calls: bool = True
    structure: Structure | None = None
    must_call: bool = False  # the reply is one or more calls
    drafts: bool = False  # show the canvases while they are denoised
    callable: tuple[str, ...] | None = None  # names of the tools that may be called; None: all of them

    @property
    def named_tool(self) -> bool:
        """Whether the client named the one tool to be called."""
        return self.must_call and self.callable is not None and len(self.callable) == 1


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A complete call the model made. `arguments` is JSON text of an object."""

    id: str
    index: int  # 0-based within its choice
    name: str
    arguments: str


@dataclass(frozen=True)
class Likelihood:
    """One token and its log-probability. `bytes`: what it spells; None for a control token, which spells nothing."""

    token: str
    bytes: tuple[int, ...] | None
    logprob: float


@dataclass(frozen=True)
class ContentToken:
    """One token of the content, as the model found it, and the likeliest ones in its place."""

    chosen: Likelihood
    top: tuple[Likelihood, ...]
    offset: int  # of its first character in the choice's whole content


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one finished canvas (or the end of the reply) adds to one choice. Never empty.

    `logprobs`, if asked for, has the tokens that begin in this piece of content. Together they cover all of it; the
    last may reach beyond a stop string's cut.
    """

    choice: int
    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[ContentToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A canvas after a denoise step, for a task that asked. It is not part of the reply, and some may be missing."""

    choice: int
    canvas: int  # 0-based
    step: int  # 1-based, within the canvas
    tokens: tuple[str | None, ...]  # the likeliest at each position; None: a control token, which spells nothing
    entropy: tuple[float, ...]  # nats
    accepted: tuple[int, ...]  # positions


@dataclass(frozen=True, kw_only=True)
class ChoiceDone:
    """The end of one choice."""

    choice: int
    finish_reason: FinishReason
    stop_string: str | None = None  # the stop string that ended it, if one did


@dataclass(frozen=True, kw_only=True)
class ReplyDone:
    """The end of the whole reply, with its counts. Tokens of all choices are added up, each prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    canvases: int
    steps: int
    seed: int  # of choice 0; choice i uses seed + i
    seconds: float  # wall time from acceptance to the end
    seconds_to_first_text: float | None  # None when no text came

    @property
    def tokens_per_forward(self) -> float:
        """Reply tokens per denoise pass; 0 when nothing was denoised."""
        return self.completion_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Reply tokens per second of wall time, everything included."""
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0


StreamItem = Delta | ChoiceDone | ReplyDone
