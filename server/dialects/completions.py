"""OpenAI's older completions: text that goes on from a prompt, with no chat template between.

Control tokens in a prompt count here: the client writes the whole prompt, and this is how it feeds a template of its
own. Knows this one wire format. Invariant: choice `i * n + j` is the j-th continuation of prompt `i`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.dialects.openai_chat import easel, usage
from server.dialects.structure_schema import ResponseFormatFields
from server.exchange import ChatTask, ChoiceDone, ContentToken, Delta
from server.replies import Reply
from server.schema import UNSUPPORTED, SamplingFields, TopLogprobs, parse, refuse, refuse_unbuilt
from server.sse import Framing

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_CHOICES = 64  # of all prompts together
_HONOURED = frozenset({"echo", "best_of", "suffix"})
_UNSUPPORTED = {
    **{name: means_off for name, means_off in UNSUPPORTED.items() if name not in _HONOURED},
}


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "str"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    return "~texts" if isinstance(first, str) else "~ids" if isinstance(first, int) else "~id_lists"


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Tag("~texts")]
    | Annotated[_Ids, Tag("~ids")]
    | Annotated[list[_Ids], Tag("~id_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


class CompletionRequest(SamplingFields, ResponseFormatFields):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, strict=True)] | None = None
    logprobs: TopLogprobs | None = None  # 0 asks for the token's own

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        refuse_unbuilt(data, _UNSUPPORTED)
        return data

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise refuse("logprobs", "is not supported together with 'echo': a prompt's logprobs are not computed")
        for name, value in (("echo", self.echo), ("logprobs", self.logprobs is not None)):
            if self.suffix and value:
                raise refuse(name, "is not supported together with 'suffix'")
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> CompletionRequest:
        if (self.best_of or 1) != 1 and self.best_of != (self.n or 1):
            raise refuse("best_of", "is supported only if it equals 'n': choosing among drafts is not built")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            context = {"field": "prompt", "most": MAX_CHOICES}
            raise PydanticCustomError("invalid_value", "asks for more than {most} choices at once", context)
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, whichever form they came in."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return tuple(each if isinstance(each, str) else tuple(each) for each in prompts)


@dataclass(frozen=True)
class AskedCompletion:
    """One completion."""

    task: ChatTask
    streamed: bool
    include_usage: bool
    framing: Framing = field(default_factory=Framing)

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer."""
        folded = await reply.fold()
        choices = [
            _choice(
                index, choice.content, choice.finish_reason, choice.logprobs if self.task.logprobs is not None else None
            )
            for index, choice in enumerate(folded.choices)
        ]
        return {**_head(reply), "choices": choices, "usage": usage(folded.done), "easel": easel(folded.done)}

    async def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The streamed answer: one chunk per finished canvas."""
        last: Json = {}
        async with aclosing(reply.stream()) as items:
            async for item in items:
                if isinstance(item, Delta):
                    tokens = item.logprobs or None
                    yield {**_head(reply), "choices": [_choice(item.choice, item.content, None, tokens)]}
                elif isinstance(item, ChoiceDone):
                    if last:
                        yield last
                    last = {**_head(reply), "choices": [_choice(item.choice, "", item.finish_reason)]}
                elif self.include_usage:
                    yield last
                    yield {**_head(reply), "choices": [], "usage": usage(item), "easel": easel(item)}
                else:
                    yield {**last, "easel": easel(item)}


def read(document: bytes) -> AskedCompletion:
    """Check a request. Raises ApiError (400)."""
    request = parse(CompletionRequest, document)
    task = ChatTask(
        prompts=request.prompts,
        suffix=request.suffix or None,
        echo=bool(request.echo),
        model=request.model,
        max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=request.logprobs,
        structure=request.structure(),
        # a gap has a likeliest filling; a text to go on with does not
        **request.sampling(temperature=0.0 if request.suffix else 1.0),
    )
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return AskedCompletion(task, bool(request.stream), include_usage)


def _head(reply: Reply) -> Json:
    return {
        "id": f"cmpl-{reply.id}",
        "object": "text_completion",
        "created": reply.created,
        "model": reply.model,
    }


def _choice(index: int, text: str, finish_reason: str | None, tokens: Sequence[ContentToken] | None = None) -> Json:
    logprobs = None if tokens is None else _logprobs(tokens)
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(tokens: Sequence[ContentToken]) -> Json:
    """OpenAI's older form: one list for each thing that is known of a token."""
    return {
        "tokens": [token.chosen.token for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        # several tokens may look alike: the likeliest of them, which is the first, counts
        "top_logprobs": [
            dict(sorted({each.token: each.logprob for each in reversed(token.top)}.items(), key=lambda item: -item[1]))
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
