"""OpenAI's chat completions: request body to `ChatTask`, stream to chunks, fold to body.

Knows this one wire format, no HTTP and no engine. The rules of the chunks (role once, finish chunk with an empty
delta, usage last with no choices, `logprobs` and `refusal` present) are what official clients rely on.
Invariant: the chunks of a stream add up to the body of the same reply.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from server.chat import Folded, FoldedChoice, Reply
from server.errors import invalid
from server.exchange import ChatTask, ChoiceDone, Delta, ReplyDone, ToolCall
from server.schema import AssistantMessage, ChatRequest, Content, HistoryToolCall, Message, ToolMessage

Json = dict[str, Any]


def to_task(request: ChatRequest) -> ChatTask:
    """Translate a checked request. Raises ApiError for template options that make no sense."""
    tools = [] if request.tool_choice == "none" else request.tools or []
    top_p, top_k = (1.0 if request.top_p is None else request.top_p), max(request.top_k or 0, 0)
    if top_p == 0:  # a nucleus of nothing is the likeliest token alone
        top_p, top_k = 1.0, 1
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    return ChatTask(
        messages=tuple(_template_messages(request.messages)),
        tools=tuple(tool.model_dump(exclude_unset=True) for tool in tools),
        template_options=_template_options(request),
        model=request.model,
        max_tokens=limit,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p,
        top_k=top_k,
        # Negative seeds are allowed on the wire; two's complement keeps them distinct.
        seed=None if request.seed is None else request.seed % 2**64,
        stop=request.stop_strings,
        choices=request.n or 1,
        parallel_tool_calls=request.parallel_tool_calls is not False,
    )


def body(reply: Reply, folded: Folded) -> Json:
    """The non-streamed answer."""
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [_choice(index, choice) for index, choice in enumerate(folded.choices)],
        "usage": _usage(folded.done),
        "easel": _easel(folded.done),
    }


async def chunks(reply: Reply, *, include_usage: bool) -> AsyncGenerator[Json, None]:
    """The streamed answer: role chunks at once, then one chunk per finished canvas."""
    head: Json = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
    }

    def chunk(index: int, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    for index in range(reply.choices):
        yield chunk(index, {"role": "assistant", "content": ""})
    finished = 0
    last: Json = {}
    async with aclosing(reply.stream()) as items:
        async for item in items:
            if isinstance(item, Delta):
                yield chunk(item.choice, _delta(item))
            elif isinstance(item, ChoiceDone):
                finished += 1
                last = chunk(item.choice, {}, item.finish_reason)
                if finished < reply.choices:
                    yield last
            elif include_usage:
                yield last
                yield {**head, "choices": [], "usage": _usage(item), "easel": _easel(item)}
            else:
                yield {**last, "easel": _easel(item)}


def model_card(name: str, *, created: int, context_length: int) -> Json:
    """One entry of the model list. `max_model_len` is what other servers call the context length."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "easel",
        "max_model_len": context_length,
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


def _choice(index: int, choice: FoldedChoice) -> Json:
    message: Json = {
        "role": "assistant",
        "content": None if choice.tool_calls and not choice.content else choice.content,
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [_call(call) for call in choice.tool_calls]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _usage(done: ReplyDone) -> Json:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
    }


def _easel(done: ReplyDone) -> Json:
    first = done.seconds_to_first_text
    return {
        "canvases": done.canvases,
        "steps": done.steps,
        "tokens_per_forward": round(done.tokens_per_forward, 3),
        "time_to_first_text_ms": None if first is None else round(first * 1000, 3),
        "tokens_per_second": round(done.tokens_per_second, 3),
        "seed": done.seed,
    }


def _template_options(request: ChatRequest) -> Mapping[str, Any]:
    options: Json = {"enable_thinking": request.reasoning_effort not in (None, "none")}
    for name, value in (request.chat_template_kwargs or {}).items():
        if name == "enable_thinking" and not isinstance(value, bool):
            raise invalid("'enable_thinking' must be true or false", param="chat_template_kwargs.enable_thinking")
        options[name] = value
    return options


def _template_messages(messages: list[Message]) -> Iterator[Json]:
    """Messages as chat templates want them: string content, argument objects, named tool results."""
    names: dict[str, str] = {}
    for message in messages:
        result: Json = {"role": message.role, "content": _text(message.content)}
        if message.name:
            result["name"] = message.name
        if isinstance(message, AssistantMessage):
            reasoning = message.reasoning_content or message.reasoning
            if reasoning:
                result["reasoning_content"] = reasoning
            if message.tool_calls:
                result["tool_calls"] = [_template_call(call) for call in message.tool_calls]
                names.update({call.id: call.function.name for call in message.tool_calls if call.id})
        elif isinstance(message, ToolMessage):
            if message.tool_call_id:
                result["tool_call_id"] = message.tool_call_id
            result["name"] = names.get(message.tool_call_id or "") or message.name or "unknown"
        yield result


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.as_text or "" for part in content)


def _template_call(call: HistoryToolCall) -> Json:
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = {"value": arguments}
    if arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        arguments = {"value": arguments}
    result: Json = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    if call.id:
        result["id"] = call.id
    return result
