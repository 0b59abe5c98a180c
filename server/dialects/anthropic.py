"""Anthropic's messages: the stream as its events, the fold as its body, and errors in its shape.

Clients written against it (agents above all) rebuild the message from the events, so every object is spelled out:
`message_start` with type and role, parts opened and closed one at a time, stop reason and usage in `message_delta`.
Knows this one wire format. Invariant: the events add up to the body of the same reply.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from server.chat import ChatService
from server.dialects.anthropic_schema import CountRequest, MessagesRequest
from server.dialects.openai_chat import easel
from server.errors import ApiError, unknown_model
from server.exchange import ChatTask, ChoiceDone, Delta, FinishReason, ReplyDone, ToolCall
from server.replies import Reply
from server.schema import parse
from server.sse import Framing, typed

Json = dict[str, Any]

# Theirs proves that a thought is untouched; clients refuse one without any. Ours proves nothing and is not read.
_SIGNATURE = "easel"
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> Json:
    """An error in Anthropic's shape; also the payload of an error event."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


@dataclass(frozen=True)
class AskedMessage:
    """One message."""

    task: ChatTask
    streamed: bool
    framing: Framing = field(default_factory=lambda: Framing(name=typed, done=False, error=error_body))

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer: the events added up, as a client does it."""
        message: Json = {}
        async with aclosing(self.chunks(reply)) as events:
            async for event in events:
                _add_up(message, event)
        return message

    async def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The streamed answer."""
        start_usage = {
            "input_tokens": reply.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        message = {**_message(reply), "content": [], "stop_reason": None, "stop_sequence": None, "usage": start_usage}
        yield {"type": "message_start", "message": message}
        parts = _Parts()
        stop: Json = {}
        async with aclosing(reply.stream()) as items:
            async for item in items:
                if isinstance(item, Delta):
                    for event in parts.add(item):
                        yield event
                elif isinstance(item, ChoiceDone):
                    stop = _stop(item.finish_reason, item.stop_string)
                    for event in parts.close():
                        yield event
                else:
                    yield {"type": "message_delta", "delta": stop, "usage": _usage(item), "easel": easel(item)}
        yield {"type": "message_stop"}


class _Parts:
    """The content parts of a streamed message: one is open at a time, and text that goes on goes on in it."""

    def __init__(self) -> None:
        self._index = -1
        self._open: Literal["thinking", "text"] | None = None

    def add(self, delta: Delta) -> Iterator[Json]:
        """The events of one delta."""
        if delta.reasoning:
            yield from self._ensure("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            yield from self._ensure("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})
        for call in delta.tool_calls:
            yield from self.close()
            yield self._start({**_tool_use(call), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
            yield {"type": "content_block_stop", "index": self._index}

    def close(self) -> Iterator[Json]:
        """Close the part that is open, if one is."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _ensure(self, kind: Literal["thinking", "text"], empty: Json) -> Iterator[Json]:
        if self._open != kind:
            yield from self.close()
            self._open = kind
            yield self._start(empty)

    def _start(self, part: Json) -> Json:
        self._index += 1
        return {"type": "content_block_start", "index": self._index, "content_block": part}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _add_up(message: Json, event: Json) -> None:
    """Let a message grow by one event."""
    if event["type"] == "message_start":
        message.update(event["message"])
    elif event["type"] == "content_block_start":
        message["content"].append(dict(event["content_block"]))
    elif event["type"] == "content_block_delta":
        part, delta = message["content"][-1], event["delta"]
        if delta["type"] == "input_json_delta":
            part["input"] = json.loads(delta["partial_json"])  # a call comes whole
        else:
            key = delta["type"].removesuffix("_delta")
            part[key] += delta[key]
    elif event["type"] == "message_delta":
        message.update(event["delta"])
        message.update({key: event[key] for key in ("usage", "easel")})


def read(document: bytes) -> AskedMessage:
    """Check a request. Raises ApiError (400)."""
    request = parse(MessagesRequest, document)
    return AskedMessage(request.task(), bool(request.stream))


def count_tokens(service: ChatService, document: bytes) -> Json:
    """How many tokens the prompt of a message has. Raises ApiError (400, 404)."""
    request = parse(CountRequest, document)
    if request.model is not None and request.model not in service.model_names:
        raise unknown_model(request.model, service.model_names)
    (prompt,) = service.render(ChatTask(**request.prompt()))
    return {"input_tokens": len(prompt.ids)}


def _message(reply: Reply) -> Json:
    return {"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "model": reply.model}


def _tool_use(call: ToolCall) -> Json:
    return {"type": "tool_use", "id": f"toolu_{call.id.removeprefix('call_')}", "name": call.name}


def _stop(reason: FinishReason, stop_string: str | None) -> Json:
    words = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    word = "stop_sequence" if stop_string is not None and reason == "stop" else words[reason]
    return {"stop_reason": word, "stop_sequence": stop_string}


def _usage(done: ReplyDone) -> Json:
    return {
        "input_tokens": done.prompt_tokens - done.cached_tokens,  # Anthropic counts cached ones apart
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": done.cached_tokens,
        "output_tokens": done.completion_tokens,
    }
