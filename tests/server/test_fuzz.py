"""Whatever a model says and a client sends: no failure, no marker shown, valid calls, and streams that add up.

Bounded here; `make fuzz CASES=100000` runs so many in all. Everything but HTTP takes part: the scripted engine says any
mix of markers, halves of calls, thoughts, bytes and noise, cut into canvases anywhere, in every wire format.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import GenerationRequest
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects import anthropic, completions, decisions, editors, openai_chat, responses, tokens
from server.dialects.response_store import ResponseStore
from server.errors import ApiError
from server.infill import open_reply
from server.prompt import PromptRenderer
from tests.fakes import CONTROL, FakeEngine, Script, Template, byte_tokenizer

CASES = int(os.environ.get("FUZZ_CASES", "0")) * 45 // 100 or 400  # of each test; test_own_openapi has the rest
Json = dict[str, Any]
STORE = ResponseStore()
READ = {
    "chat": openai_chat.read,
    "completions": completions.read,
    "responses": partial(responses.read, STORE),
    "messages": anthropic.read,
    "fim": editors.read_fim,
    "llama": editors.read_llama,
}
FUZZ = partial(settings, deadline=None, suppress_health_check=list(HealthCheck))
MARKER = re.compile("|".join(map(re.escape, CONTROL)) + r"|<unused\d+>")
TOKENS = byte_tokenizer()

SPELLING = {TOKENS.token_to_id("<"), TOKENS.token_to_id("<0x3C>")}  # a marker that is spelled out is text
# What the model may say: control tokens, parts of calls in every form it falls back to, text, halves of characters.
FRAGMENTS = (
    *("call:f{", "call:g(", "call:nobody{", "a:", "b=", "1", "-2.5e3", "true", "null", "'it'", '"x"', "[", "]", "{"),
    *("}", ")", ",", "thought\n", "\n", " ", "STOP", "ST", "Hello", "naïve ☕ 🙂", "\u2028", "\\", "é"),
)
CALLS = (
    '<|tool_call>call:f{a:<|"|>x, {y}<|"|>,b:5}<tool_call|>',
    '<|tool_call>call:g{b:"7"}',
    "call:f(a='it''s', b=3)",
    '<|tool_call>call:f{a:<|"|>',
    "<|channel>thought\nso\n<channel|>",
)
SAID = st.lists(
    st.sampled_from(list(CONTROL))
    | st.sampled_from(CALLS)
    | st.sampled_from(FRAGMENTS)
    | st.text(st.characters(blacklist_characters="<", blacklist_categories=["Cs"]), max_size=6)
    | st.integers(0, 600).filter(lambda token_id: token_id not in SPELLING),  # bytes, reserved ids, and beyond all
    max_size=24,
)


def ids_of(said: list[Any]) -> list[int]:
    ids: list[int] = []
    for piece in said:
        ids += [piece] if isinstance(piece, int) else TOKENS.encode(piece, add_special_tokens=False).ids
    return [token_id for token_id in ids if token_id not in (1, 50, 106)]  # the engine stops at these


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    ids = ids_of(draw(SAID))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    canvases = [ids[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    reason = draw(st.sampled_from(["stop", "stop", "length"]))
    return Script([canvas for canvas in canvases if canvas], reason=reason, stop_id=106, steps=1)  # type: ignore[arg-type]


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
WORDS = st.sampled_from(["Hi", "", "<|turn>model\n", "<unused5>", "a\u0000b", "☕" * 3, "{", "call:f{a:1}", "x" * 40])
SEED = {"seed": 1, "temperature": 0.5}


@st.composite
def chats(draw: st.DrawFn) -> Json:
    """Conversations: any order of roles, calls and results, known or not."""
    messages: list[Json] = []
    for _ in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["user", "user", "system", "developer", "assistant", "tool"]))
        message: Json = {"role": role, "content": draw(WORDS)}
        if role == "assistant" and draw(st.booleans()):
            arguments = draw(st.sampled_from(["{}", '{"a": "b"}', "[", "5", "", '{"a": {"b": [1, null]}}']))
            message["tool_calls"] = [{"id": draw(WORDS), "function": {"name": "f", "arguments": arguments}}]
            message["reasoning_content"] = draw(WORDS)
        if role == "tool":
            message["tool_call_id"] = draw(WORDS)
        messages.append(message)
    body: Json = {"messages": messages, **SEED}
    if draw(st.booleans()):
        body["tools"] = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in "fg"]
        body["parallel_tool_calls"] = draw(st.booleans())
    body["stop"] = draw(st.sampled_from([None, "STOP", ["ST", "x"]]))
    body["n"] = draw(st.integers(1, 2))
    body["reasoning_effort"] = draw(st.sampled_from([None, "none", "high"]))
    body["max_tokens"] = draw(st.sampled_from([None, 1, 7]))
    if draw(st.booleans()):
        body |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 3))}
    return body


@st.composite
def in_any_format(draw: st.DrawFn) -> tuple[str, Json]:
    """A request in one of the wire formats, made of a chat."""
    kind, chat = draw(st.sampled_from(list(READ))), draw(chats())
    text = draw(WORDS)
    if kind == "chat":
        return kind, chat
    if kind == "completions":
        suffix = draw(st.sampled_from([None, None, "end"]))
        return kind, {"prompt": [text, "b"], "stop": chat["stop"], "suffix": suffix, "max_tokens": 9, **SEED}
    if kind == "fim":
        return kind, {"prompt": text, "suffix": draw(WORDS), "stop": chat["stop"], **SEED}
    if kind == "llama":
        return kind, {"input_prefix": text, "input_suffix": draw(WORDS), "n_predict": draw(st.integers(-1, 9)), **SEED}
    if kind == "responses":
        items = [{**each, "role": "user"} if each["role"] == "tool" else each for each in chat["messages"]]
        tools = [{"type": "function", "name": "f", "parameters": SCHEMA}] if "tools" in chat else []
        effort = {"effort": chat["reasoning_effort"]} if chat["reasoning_effort"] else None
        include = ["message.output_text.logprobs"] if "logprobs" in chat else []
        return kind, {"input": items, "tools": tools, "reasoning": effort, "include": include, **SEED}
    said = [{"role": role, "content": text or "x"} for role in ("user", "assistant", "user")]
    tools = [{"name": name, "input_schema": SCHEMA} for name in "fg"] if "tools" in chat else []
    thinking = {"type": "enabled" if chat["reasoning_effort"] == "high" else "disabled", "budget_tokens": 1024}
    return kind, {"messages": said, "max_tokens": 50, "tools": tools, "thinking": thinking, "temperature": 0.5}


class World:
    """One server that says what it is told, with a loop of its own."""

    def __init__(self) -> None:
        self.said = Script()
        self.engine = FakeEngine(self._say)
        self.loop = asyncio.new_event_loop()
        self.bridge = Bridge(self.engine)
        self.service = ChatService(self.bridge, PromptRenderer(byte_tokenizer(), Template()), ["demo"])

    def _say(self, request: GenerationRequest) -> Script:
        return self.said

    async def _answer(self, kind: str, body: Json) -> tuple[Json, list[Json]]:
        document = json.dumps(body).encode()
        asked = READ[kind](document)
        reply = await open_reply(self.service, asked.task)
        try:
            whole = await asked.body(reply)
        finally:
            await reply.close()
        streamed = READ[kind](document)
        reply = await open_reply(self.service, streamed.task)
        try:
            async with aclosing(streamed.chunks(reply)) as chunks:
                return whole, [chunk async for chunk in chunks]
        finally:
            await reply.close()

    def answer(self, kind: str, body: Json, said: Script) -> tuple[Json, list[Json]] | None:
        """The body and the chunks; None for a request that is refused."""
        self.said = said
        self.engine.requests.clear()
        self.engine.canvases.clear()
        try:
            return self.loop.run_until_complete(asyncio.wait_for(self._answer(kind, body), 20))
        except ApiError as error:
            assert error.status == 400, error.message
            return None


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    with made.bridge:
        yield made
    made.loop.close()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            if key != "top_logprobs":  # what else might have stood there may well be a control token
                yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def told(kind: str, whole: Json, chunks: list[Json]) -> tuple[list[Any], list[Any]]:
    """What body and stream say, in comparable form."""
    if kind in ("chat", "fim"):
        counted = range(len(whole["choices"]))
        deltas = [(part["index"], part["delta"]) for chunk in chunks for part in chunk["choices"]]
        streamed = []
        for number in counted:
            own = [delta for index, delta in deltas if index == number]
            content = "".join(delta.get("content") or "" for delta in own)
            reasoning = "".join(delta.get("reasoning_content") or "" for delta in own)
            calls = [call["function"] for delta in own for call in delta.get("tool_calls", [])]
            streamed.append((content, reasoning, calls))
        messages = [choice["message"] for choice in whole["choices"]]
        return [
            (
                message["content"] or "",
                message.get("reasoning_content", ""),
                [call["function"] for call in message.get("tool_calls", [])],
            )
            for message in messages
        ], streamed
    if kind == "completions":
        parts = [part for chunk in chunks for part in chunk["choices"]]
        return [choice["text"] for choice in whole["choices"]], [
            "".join(part["text"] for part in parts if part["index"] == number)
            for number in range(len(whole["choices"]))
        ]
    if kind == "llama":
        return [whole["content"]], ["".join(chunk["content"] for chunk in chunks)]
    if kind == "responses":

        def items(response: Json) -> list[Any]:
            return [(each["type"], each.get("content"), each.get("arguments")) for each in response["output"]]

        return items(whole), items(chunks[-1]["response"])
    return ["".join(block.get("text", "") for block in whole["content"])], [
        "".join(chunk["delta"].get("text", "") for chunk in chunks if chunk["type"] == "content_block_delta")
    ]


@FUZZ(max_examples=CASES)
@given(in_any_format(), scripts())
def test_any_reply_to_any_request_in_any_format(world: World, asked: tuple[str, Json], said: Script) -> None:
    kind, body = asked
    answer = world.answer(kind, body, said)
    if answer is None:
        return
    whole, chunks = answer
    shown = [text for part in (whole, *chunks) for text in strings(part)]
    if kind != "responses" or "instructions" not in body:
        assert not [text for text in shown if MARKER.search(text)], "a marker is shown"
    in_body, in_stream = told(kind, whole, chunks)
    assert in_body == in_stream
    for call in [call for _, _, calls in in_body for call in calls] if kind == "chat" else []:
        assert isinstance(json.loads(call["arguments"]), dict)


NAMES = st.sampled_from(["type", "role", "content", "name", "text", "id"])
LEAVES = st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | WORDS | st.sampled_from(["user", "text"])
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
FIELDS = st.sampled_from(
    [
        *("messages", "prompt", "input", "tools", "tool_choice", "stop", "n", "seed", "temperature", "top_p", "top_k"),
        *("logit_bias", "logprobs", "top_logprobs", "easel", "min_p", "presence_penalty", "response_format", "text"),
        *("questions", "joint", "suffix", "max_tokens", "stream", "stream_options", "reasoning", "thinking", "include"),
        *("input_prefix", "input_extra", "n_predict", "tokens", "content", "chat_template_kwargs", "system", "model"),
    ]
)


OTHERS = ("decisions", "tokenize", "detokenize", "apply")


@FUZZ(max_examples=CASES)
@given(st.sampled_from([*READ, *OTHERS]), st.dictionaries(FIELDS, ANY, max_size=5), chats())
def test_any_document_is_a_request_or_a_400(world: World, kind: str, fields: Json, chat: Json) -> None:
    start: Json = {"chat": chat, "completions": {"prompt": "a"}, "responses": {"input": "a"}}
    start |= {"fim": {"prompt": "a", "suffix": "b"}}
    start |= {"messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}, "llama": {"n_predict": 3}}
    start |= {"tokenize": {"prompt": "a"}, "detokenize": {"tokens": [1]}, "apply": {"messages": chat["messages"]}}
    start |= {"decisions": {"input": "a", "questions": [{"type": "predicate", "instructions": "b"}]}}
    body = {**start[kind], **fields}
    body.pop("model", None)
    document = json.dumps(body).encode()
    plain = {"tokenize": tokens.tokenize, "detokenize": tokens.detokenize, "apply": tokens.apply_template}
    try:
        if kind in plain:
            json.dumps(plain[kind](world.service, document))
        elif kind == "decisions":
            work = asyncio.wait_for(decisions.decide(world.service, document), 20)
            json.dumps(world.loop.run_until_complete(work))
        else:
            world.answer(kind, body, Script([ids_of(["Hello"])], steps=1))
    except ApiError as error:
        assert error.status == 400, error.message
