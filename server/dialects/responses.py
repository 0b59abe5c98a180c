"""OpenAI's responses: items and numbered events instead of a message and deltas, and a memory of earlier ones.

Every event carries its number; every item is announced, filled and closed in that order, which is what official
clients insist on. Knows this one wire format. Invariant: the body of a reply is the response its last event carries.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from server.dialects.history import History
from server.dialects.openai_chat import easel, template_options, token_logprobs
from server.dialects.response_store import ResponseStore, Stored
from server.dialects.responses_schema import ResponsesRequest, add_input, add_output
from server.errors import ApiError, invalid
from server.exchange import ChatTask, ChoiceDone, ContentToken, Delta, Likelihood, ReplyDone, ToolCall
from server.replies import Reply
from server.schema import parse
from server.sse import Framing, typed

Json = dict[str, Any]

_DELTA = {"reasoning": "response.reasoning_text", "message": "response.output_text"}
_WORD = {"reasoning": "rs", "message": "msg"}


class AskedResponse:
    """One response."""

    def __init__(self, request: ResponsesRequest, task: ChatTask, conversation: History, store: ResponseStore) -> None:
        self.task = task
        self.streamed = bool(request.stream)
        self.framing = Framing(name=typed, error=self._error_event)
        self._request = request
        self._conversation = conversation
        self._store = store
        self._numbers = itertools.count()

    async def body(self, reply: Reply) -> Json:
        """The non-streamed answer: the response that the last event carries."""
        last: Json = {}
        async with aclosing(self.chunks(reply)) as events:
            async for event in events:
                last = event
        response: Json = last["response"]
        return response

    async def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The events. An engine that gives up ends them with `response.failed` and then ApiError."""
        started = self._response(reply, "in_progress", [])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        output = _Output(reply.id)
        cut = False
        try:
            async with aclosing(reply.stream()) as items:
                async for item in items:
                    if isinstance(item, Delta):
                        for event in output.add(item):
                            yield self._event(**event)
                    elif isinstance(item, ChoiceDone):
                        cut = item.finish_reason == "length"
                        for event in output.close("incomplete" if cut else "completed"):
                            yield self._event(**event)
                    else:
                        yield self._end(reply, output, item, cut)
        except ApiError as error:
            failed = self._response(reply, "failed", output.items)
            failed["error"] = {"code": "server_error", "message": error.message}
            yield self._event("response.failed", response=failed)
            raise

    def _end(self, reply: Reply, output: _Output, done: ReplyDone, cut: bool) -> Json:
        status: Literal["completed", "incomplete"] = "incomplete" if cut else "completed"
        response = self._response(reply, status, output.items)
        response["completed_at"] = None if cut else int(time.time())
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = _usage(done)
        response["easel"] = easel(done)
        if self._request.store is not False:
            add_output(self._conversation, output.items)
            self._store.put(Stored(response, tuple(self._conversation.messages)))
        return self._event(f"response.{status}", response=response)

    def _event(self, type: str, **fields: Any) -> Json:  # `type` is the wire's word
        return {"type": type, "sequence_number": next(self._numbers), **fields}

    def _error_event(self, error: ApiError) -> Json:
        return error_event(error, next(self._numbers))

    def _response(self, reply: Reply, status: str, output: list[Json]) -> Json:
        request = self._request
        return {
            "id": f"resp_{self._store.tag}{reply.id}",
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": reply.model,
            "output": list(output),
            "parallel_tool_calls": self.task.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": request.store is not False,
            "temperature": self.task.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.echoed() for tool in request.tools or []],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "metadata": request.metadata or {},
            "presence_penalty": self.task.presence_penalty,
            "frequency_penalty": self.task.frequency_penalty,
            # no use is made of these; Open Responses wants them said all the same
            "max_tool_calls": request.max_tool_calls,
            "service_tier": "default",
            "safety_identifier": request.safety_identifier,
            "prompt_cache_key": request.prompt_cache_key,
            "user": request.user,
            "usage": None,
        }


@dataclass
class _Output:
    """The items of a response in the making. One is open at a time; more of its kind goes on in it."""

    reply_id: str
    items: list[Json] = field(default_factory=list)  # the closed ones
    _kind: Literal["reasoning", "message"] | None = None
    _text: str = ""
    _tokens: list[ContentToken] = field(default_factory=list)  # of the open message, if logprobs were asked for

    def add(self, delta: Delta) -> Iterator[Json]:
        """The events of one delta, without their numbers."""
        yield from self._write("reasoning", delta.reasoning)
        yield from self._write("message", delta.content, delta.logprobs)
        for call in delta.tool_calls:
            yield from self.close("completed")
            yield from self._call(call)

    def close(self, status: str) -> Iterator[Json]:
        """Close the item that is open, if one is."""
        if self._kind is None:
            return
        part = _part(self._kind, self._text, self._tokens)
        item = self._item(self._kind, [part], status)
        logprobs: Json = {"logprobs": _event_logprobs(self._tokens)} if self._kind == "message" else {}
        yield {"type": f"{_DELTA[self._kind]}.done", **self._place(), "text": self._text, **logprobs}
        yield {"type": "response.content_part.done", **self._place(), "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._kind, self._text, self._tokens = None, "", []

    def _write(
        self, kind: Literal["reasoning", "message"], text: str, tokens: Sequence[ContentToken] = ()
    ) -> Iterator[Json]:
        if not text:
            return
        if self._kind != kind:
            yield from self.close("completed")
            self._kind = kind
            item = self._item(kind, [], "in_progress")
            yield {"type": "response.output_item.added", "output_index": len(self.items), "item": item}
            yield {"type": "response.content_part.added", **self._place(), "part": _part(kind, "")}
        self._text += text
        self._tokens += tokens
        logprobs: Json = {"logprobs": _event_logprobs(tokens)} if kind == "message" else {}
        yield {"type": f"{_DELTA[kind]}.delta", **self._place(), "delta": text, **logprobs}

    def _call(self, call: ToolCall) -> Iterator[Json]:
        index, item_id = len(self.items), f"fc_{call.id.removeprefix('call_')}"
        place = {"item_id": item_id, "output_index": index}
        item = {
            "type": "function_call",
            "id": item_id,
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        yield {
            "type": "response.function_call_arguments.done",
            **place,
            "name": call.name,
            "arguments": call.arguments,
        }
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.items.append(item)

    def _place(self) -> Json:
        return {"item_id": self._id(), "output_index": len(self.items), "content_index": 0}

    def _id(self) -> str:
        return f"{_WORD[self._kind or 'message']}_{self.reply_id}{len(self.items):04x}"

    def _item(self, kind: Literal["reasoning", "message"], content: list[Json], status: str) -> Json:
        item: Json = {"type": kind, "id": self._id(), "status": status, "content": content}
        return {**item, "role": "assistant"} if kind == "message" else {**item, "summary": []}


def read(store: ResponseStore, document: bytes) -> AskedResponse:
    """Check a request. Raises ApiError (400), also when the response to go on from is not kept (any more)."""
    request = parse(ResponsesRequest, document)
    earlier: tuple[Json, ...] = ()
    if request.previous_response_id is not None:
        stored = store.get(request.previous_response_id)
        if stored is None:
            message = f"Previous response with id '{request.previous_response_id[:100]}' not found."
            raise invalid(message, param="previous_response_id", code="previous_response_not_found")
        earlier = stored.messages
    conversation = History(earlier)
    add_input(conversation, request.input)
    # Instructions are of this response only: the next one brings its own.
    instructions = [{"role": "system", "content": request.instructions}] if request.instructions else []
    choice = request.choice()
    tools = [] if choice.hides_tools else request.tools or []
    task = ChatTask(
        messages=(*instructions, *conversation.messages),
        tools=tuple(tool.for_task() for tool in tools),
        template_options=template_options(
            request.reasoning.effort if request.reasoning else None, request.chat_template_kwargs
        ),
        model=request.model,
        max_tokens=request.max_output_tokens,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        logprobs=request.logprobs,
        structure=request.structure(),
        **choice.for_task(),
        **request.draw(),
    )
    if not task.messages:
        raise invalid("'input' is empty", param="input")
    return AskedResponse(request, task, conversation, store)


def retrieve(store: ResponseStore, response_id: str) -> Json:
    """A response that is still kept. Raises ApiError (404)."""
    stored = store.get(response_id)
    if stored is None:
        raise _gone(response_id)
    return stored.response


def delete(store: ResponseStore, response_id: str) -> Json:
    """Forget a response. Raises ApiError (404)."""
    if not store.delete(response_id):
        raise _gone(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def error_event(error: ApiError, number: int) -> Json:
    """The event that tells of an error, as the stream's event of that number."""
    # Flat is OpenAI's form; its own client raises only if there is also a nested one.
    flat = {"code": error.code, "message": error.message, "param": error.param}
    return {"type": "error", "sequence_number": number, **flat, "error": error.body()["error"]}


def _gone(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id '{response_id[:100]}' not found.", code="not_found")


def _part(kind: Literal["reasoning", "message"], text: str, tokens: Sequence[ContentToken] = ()) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": [token_logprobs(token) for token in tokens],
    }


def _event_logprobs(tokens: Sequence[ContentToken]) -> list[Json]:
    """What an event has of the tokens: as a part has it, but without the bytes."""

    def bare(found: Likelihood) -> Json:
        return {"token": found.token, "logprob": found.logprob}

    return [{**bare(token.chosen), "top_logprobs": [bare(each) for each in token.top]} for token in tokens]


def _usage(done: ReplyDone) -> Json:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": done.cached_tokens,
            "cache_write_tokens": done.prompt_tokens - done.cached_tokens,
        },
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
