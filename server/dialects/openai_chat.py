"""OpenAI's chat completions: request body to `ChatTask`, stream to chunks, fold to body.

Knows this one wire format, no HTTP and no engine. The rules of the chunks (role once, finish chunk with an empty
delta, usage last with no choices, `logprobs` and `refusal` present) are what official clients rely on.
Invariant: the chunks of a stream add up to the body of the same reply.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from server.dialects.chat_schema import (
    AssistantMessage,
    ChatRequest,
    Content,
    Message,
    ToolMessage,
    UserMessage,
    parse_chat_request,
)
from server.dialects.history import History
from server.errors import invalid
from server.exchange import (
    ChatTask,
    ChoiceDone,
    ContentToken,
    Delta,
    Draft,
    FinishReason,
    Likelihood,
    ReplyDone,
    ToolCall,
)
from server.images import image_part, misplaced, shown
from server.replies import Folded, FoldedChoice, Reply
from server.sse import Framing

Json = dict[str, Any]
DRAFT = "easel.draft"  # the kind and the event name of what only those see who ask


@dataclass(frozen=True)
class AskedChat:
    """One chat completion."""

    task: ChatTask
    streamed: bool
    include_usage: bool
    framing: Framing = field(default_factory=lambda: Framing(name=_event_name))

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer."""
        return body(reply, await reply.fold(), named_tool=self.task.named_tool)

    def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The streamed answer."""
        return chunks(reply, include_usage=self.include_usage, named_tool=self.task.named_tool)


def read(document: bytes) -> AskedChat:
    """Check a request. Raises ApiError (400)."""
    request = parse_chat_request(document)
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return AskedChat(to_task(request), bool(request.stream), include_usage)


def to_task(request: ChatRequest) -> ChatTask:
    """Translate a checked request. Raises ApiError for template options that make no sense."""
    choice = request.choice()
    tools = [] if choice.hides_tools else request.tools or []
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    return ChatTask(
        messages=template_messages(request.messages),
        tools=tuple(tool.model_dump(exclude_unset=True) for tool in tools),
        template_options=template_options(request.reasoning_effort, request.chat_template_kwargs),
        model=request.model,
        max_tokens=limit,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structure=request.structure(),
        drafts=request.drafts,
        **choice.for_task(),
        **request.sampling(),
    )


def body(reply: Reply, folded: Folded, *, named_tool: bool = False) -> Json:
    """The non-streamed answer."""
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [
            _choice(index, choice, asked=reply.logprobs is not None, named_tool=named_tool)
            for index, choice in enumerate(folded.choices)
        ],
        "usage": usage(folded.done),
        "easel": easel(folded.done),
    }


async def chunks(reply: Reply, *, include_usage: bool, named_tool: bool = False) -> AsyncGenerator[Json, None]:
    """The streamed answer: role chunks at once, then one chunk per finished canvas."""
    head: Json = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
    }

    def chunk(index: int, delta: Json, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    for index in range(reply.choices):
        yield chunk(index, {"role": "assistant", "content": ""})
    finished = 0
    last: Json = {}
    async with aclosing(reply.watched()) as items:
        async for item in items:
            if isinstance(item, Delta):
                yield chunk(item.choice, _delta(item), logprobs=_logprobs(item.logprobs) if item.logprobs else None)
            elif isinstance(item, Draft):
                yield {**head, "object": DRAFT, "choices": [], "draft": _draft(item)}
            elif isinstance(item, ChoiceDone):
                finished += 1
                last = chunk(item.choice, {}, _finish_reason(item.finish_reason, named_tool))
                if finished < reply.choices:
                    yield last
            elif include_usage:
                yield last
                yield {**head, "choices": [], "usage": usage(item), "easel": easel(item)}
            else:
                yield {**last, "easel": easel(item)}


def _finish_reason(reason: FinishReason, named_tool: bool) -> FinishReason:
    """OpenAI reports the call of a tool that the client itself named as a plain end."""
    return "stop" if named_tool and reason == "tool_calls" else reason


def _event_name(chunk: Json) -> str | None:
    """Ordinary chunks are events without a name."""
    return DRAFT if chunk.get("object") == DRAFT else None


def _draft(draft: Draft) -> Json:
    return {
        "choice": draft.choice,
        "canvas": draft.canvas,
        "step": draft.step,
        "tokens": draft.tokens,
        "entropy": [round(value, 3) for value in draft.entropy],
        "accepted": draft.accepted,
    }


def model_card(name: str, *, created: int, context_length: int, images: bool) -> Json:
    """One entry of the model list. `max_model_len` is what other servers call the context length."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "easel",
        "max_model_len": context_length,
        "input_modalities": ["text", "image"] if images else ["text"],
    }


def _delta(delta: Delta) -> Json:
    result: Json = {}
    if delta.reasoning:
        result["reasoning_content"] = delta.reasoning
    if delta.content:
        result["content"] = delta.content
    if delta.tool_calls:
        result["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.tool_calls]
    return result


def _choice(index: int, choice: FoldedChoice, *, asked: bool, named_tool: bool) -> Json:
    message: Json = {
        "role": "assistant",
        "content": None if choice.tool_calls and not choice.content else choice.content,
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [_call(call) for call in choice.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs) if asked else None,
        "finish_reason": _finish_reason(choice.finish_reason, named_tool),
    }


def _logprobs(tokens: Sequence[ContentToken]) -> Json:
    return {"content": [token_logprobs(token) for token in tokens], "refusal": None}


def token_logprobs(token: ContentToken) -> Json:
    """One token of the content in OpenAI's newer form."""
    return {**likelihood(token.chosen), "top_logprobs": [likelihood(each) for each in token.top]}


def likelihood(found: Likelihood) -> Json:
    """A token and how likely it was found."""
    return {
        "token": found.token,
        "logprob": found.logprob,
        "bytes": None if found.bytes is None else list(found.bytes),
    }


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage(done: ReplyDone) -> Json:
    """Token counts as OpenAI writes them."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
    }


def easel(done: ReplyDone) -> Json:
    """What only this server has to tell of a reply."""
    first = done.seconds_to_first_text
    return {
        "canvases": done.canvases,
        "steps": done.steps,
        "tokens_per_forward": round(done.tokens_per_forward, 3),
        "time_to_first_text_ms": None if first is None else round(first * 1000, 3),
        "tokens_per_second": round(done.tokens_per_second, 3),
        "seed": done.seed,
    }


def template_options(effort: str | None, given: Mapping[str, Any] | None) -> Json:
    """Options of the chat template. Raises ApiError (400) for one that makes no sense."""
    options: Json = {"enable_thinking": effort not in (None, "none")}
    for name, value in (given or {}).items():
        if name == "enable_thinking" and not isinstance(value, bool):
            raise invalid("'enable_thinking' must be true or false", param="chat_template_kwargs.enable_thinking")
        options[name] = value
    return options


def template_messages(messages: Iterable[Message]) -> tuple[Json, ...]:
    """Messages as chat templates want them."""
    history = History()
    for index, message in enumerate(messages):
        param = f"messages[{index}].content"
        if isinstance(message, AssistantMessage):
            text = as_text(message.content, param)
            history.answer(text, reasoning=message.reasoning_content or message.reasoning or "", name=message.name)
            for call in message.tool_calls or ():
                history.call(call.id, call.function.name, call.function.arguments)
        elif isinstance(message, ToolMessage):
            history.result(message.tool_call_id, as_content(message.content, param), message.name)
        elif isinstance(message, UserMessage):
            history.say(message.role, as_content(message.content, param), message.name)
        else:
            history.say(message.role, as_text(message.content, param), message.name)
    return tuple(history.messages)


def as_content(content: Content, param: str) -> str | list[Mapping[str, Any]]:
    """The content of a message, images in their places."""
    if isinstance(content, str):
        return content
    return shown(
        [
            {"type": "text", "text": part.as_text or ""}
            if part.image is None
            else image_part(part.image, f"{param}[{index}]")
            for index, part in enumerate(content)
        ]
    )


def as_text(content: Content | None, param: str) -> str:
    """The text of a message that has no images: parts are paragraphs of it. Raises ApiError (400)."""
    text = as_content(content or "", param)
    if isinstance(text, str):
        return text
    raise misplaced(text)
