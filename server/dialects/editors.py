"""Infill as editors ask for it: llama.cpp's `POST /infill`, and `POST /v1/fim/completions` of Continue and Mistral.

Both are raw text on both sides of a gap, like `suffix` in completions. Knows these two wire formats.
Invariant: fields that only tune another server's sampler or cache are accepted without effect; the text is the same
that `/v1/completions` would give.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field

from server.dialects.openai_chat import body, chunks
from server.dialects.structure_schema import GuidedFields, ResponseFormatFields
from server.exchange import ChatTask, Delta, ReplyDone
from server.replies import FoldedChoice, Reply
from server.schema import OPEN, DrawFields, SamplingFields, parse
from server.sse import Framing

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 64  # of a gap, where the editor sets no bound


class FimRequest(SamplingFields, ResponseFormatFields):
    """The body of `POST /v1/fim/completions`."""

    prompt: str
    suffix: str | None = None


@dataclass(frozen=True)
class AskedFim:
    """One gap; the answer has the form of a chat completion."""

    task: ChatTask
    streamed: bool
    include_usage: bool
    framing: Framing = field(default_factory=Framing)

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer."""
        return body(reply, await reply.fold())

    def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The streamed answer."""
        return chunks(reply, include_usage=self.include_usage)


def read_fim(document: bytes) -> AskedFim:
    """Check a request. Raises ApiError (400)."""
    request = parse(FimRequest, document)
    task = ChatTask(
        prompts=(request.prompt,),
        suffix=request.suffix or "",
        model=request.model,
        max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
        structure=request.structure(),
        **request.sampling(temperature=0.0),
    )
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return AskedFim(task, bool(request.stream), include_usage)


class ExtraFile(BaseModel):
    """Another file, to be read before the one with the gap."""

    model_config = OPEN
    filename: str | None = None
    text: str


class LlamaRequest(DrawFields, GuidedFields):
    """The body of llama.cpp's `POST /infill`. `prompt` is the beginning of what stands in the gap."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = None
    model: str | None = None
    n_predict: Annotated[int, Field(ge=-1, strict=True)] | None = None  # -1: no bound; 0: nothing is written
    stop: list[str] | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class AskedLlama:
    """One gap."""

    task: ChatTask
    streamed: bool
    framing: Framing = field(default_factory=lambda: Framing(done=False))

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer."""
        folded = await reply.fold()
        return _llama(reply, folded.choices[0], folded.done, folded.choices[0].content)

    async def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The text, then what there is to say about it."""
        end: FoldedChoice | None = None
        async with aclosing(reply.stream()) as items:
            async for item in items:
                if isinstance(item, Delta):
                    yield {"index": 0, "content": item.content, "stop": False}
                elif isinstance(item, ReplyDone):
                    assert end is not None, "the choice ends before the reply"
                    yield _llama(reply, end, item, "")
                else:
                    end = FoldedChoice("", "", (), item.finish_reason, item.stop_string)


def read_llama(document: bytes) -> AskedLlama:
    """Check a request. Raises ApiError (400)."""
    request = parse(LlamaRequest, document)
    files = [f"{extra.filename}\n{extra.text}" if extra.filename else extra.text for extra in request.input_extra or ()]
    bound = request.n_predict
    task = ChatTask(
        prompts=("\n".join((*files, request.input_prefix + (request.prompt or ""))),),
        suffix=request.input_suffix,
        model=request.model,
        max_tokens=DEFAULT_MAX_TOKENS if bound is None or bound < 0 else bound,
        stop=tuple(request.stop or ()),
        structure=request.structure(),
        **request.draw(temperature=0.0),
    )
    return AskedLlama(task, bool(request.stream))


def _llama(reply: Reply, choice: FoldedChoice, done: ReplyDone, text: str) -> Json:
    milliseconds = done.seconds * 1000
    return {
        "index": 0,
        "content": text,
        "model": reply.model,
        "stop": True,
        "stop_type": "word" if choice.stop_string else "limit" if choice.finish_reason == "length" else "eos",
        "stopping_word": choice.stop_string or "",
        "truncated": False,
        "tokens_predicted": done.completion_tokens,
        "tokens_evaluated": done.prompt_tokens,
        "tokens_cached": done.cached_tokens,
        "timings": {
            "prompt_n": done.prompt_tokens,
            "predicted_n": done.completion_tokens,
            "predicted_ms": round(milliseconds, 3),
            "predicted_per_second": round(done.tokens_per_second, 3),
        },
    }
