"""Logprobs in all wire formats: they cover the content and nothing else, whatever is held back or cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import TokenLogprobs
from server.likelihoods import Likelihoods
from server.output_parser import OutputParser, StopStrings
from server.prompt import PromptRenderer
from tests.fakes import byte_tokenizer, script

Serve = Callable[..., Any]
THOUGHT = "<|channel>thought\nhm, so\n<channel|>"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def payloads(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def spelled(tokens: Sequence[Any]) -> bytes:
    return b"".join(bytes(token["bytes"]) for token in tokens)


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        (script("Hello ", "there"), {}),
        (script(THOUGHT + "Yes", ", I do"), {"reasoning_effort": "high"}),
        (script("See " + CALL, CALL + " so"), {"tools": [TOOL]}),
        (script("call:get_weather of it", "all"), {"tools": [TOOL]}),
        (script("naïve ☕", "🙂!"), {}),
        (script("thou shalt"), {}),
        (script(CALL), {"tools": [TOOL]}),
        (script(""), {}),
        (script("a<unused5>b<pad>c"), {}),
    ],
)
def test_the_tokens_are_the_content(serve: Serve, said: Any, fields: dict[str, Any]) -> None:
    choice = serve(said).chat(logprobs=True, top_logprobs=2, **fields).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert spelled(tokens).decode() == (choice["message"]["content"] or "")
    assert {token["logprob"] for token in tokens} <= {-0.75}
    for token in tokens:
        assert [each["token"] for each in token["top_logprobs"]] == [token["token"], "<|turn>"]
        assert token["top_logprobs"][1]["bytes"] is None, "a control token spells nothing"
    streamed: list[Any] = []
    for chunk in payloads(serve(said).chat(logprobs=True, top_logprobs=2, stream=True, **fields).text):
        for part in chunk["choices"]:
            new = (part["logprobs"] or {"content": []})["content"]
            assert spelled(new).decode().startswith(part["delta"].get("content") or "")
            streamed += new
    assert streamed == tokens


def test_nothing_unless_asked(serve: Serve) -> None:
    client = serve(script("Hi"))
    assert client.chat().json()["choices"][0]["logprobs"] is None
    assert client.engine.requests[0].logprobs is None
    assert client.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert client.engine.requests[1].logprobs == 0


@pytest.mark.parametrize(
    ("stop", "content", "tokens"),
    [
        (["lo"], "hel", "hell"),  # the token `hell` is cut: it is there, being what the shown characters are made of
        (["o"], "hell", "hell"),
        ([" th"], "hello", "hello"),
        (["zz"], "hello there", "hello there"),
        (["re", "z"], "hello the", "hello the"),
        (["hell"], "", ""),
    ],
)
def test_a_stop_string_cuts_the_tokens_too(serve: Serve, stop: list[str], content: str, tokens: str) -> None:
    choice = serve(script("hello t", "here")).chat(logprobs=True, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == content
    assert spelled(choice["logprobs"]["content"]).decode() == tokens


def test_completions_have_the_older_form(serve: Serve) -> None:
    client = serve(script("hell", "o ☕"))
    choice = client.request("POST", "/v1/completions", json={"prompt": "a", "logprobs": 1}).json()["choices"][0]
    found = choice["logprobs"]
    assert found["tokens"] == ["hell", "o", " ", "\\xe2", "\\x98", "\\x95"]
    assert found["text_offset"] == [0, 4, 5, 6, 6, 6]
    assert found["token_logprobs"] == [-0.75] * 6
    assert found["top_logprobs"] == [{token: -0.75} for token in found["tokens"]]
    streamed: dict[str, list[Any]] = {name: [] for name in found}
    body = {"prompt": "a", "logprobs": 1, "stream": True}
    for chunk in payloads(client.request("POST", "/v1/completions", json=body).text):
        for part in chunk["choices"]:
            for name, values in (part["logprobs"] or {}).items():
                streamed[name] += values
    assert streamed == found


def test_a_prompts_logprobs_are_refused(serve: Serve) -> None:
    body = {"prompt": "a", "logprobs": 0, "echo": True}
    error = serve(script("x")).request("POST", "/v1/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("logprobs", "unsupported_value")


@pytest.mark.parametrize("fields", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_responses(serve: Serve, fields: dict[str, Any]) -> None:
    client = serve(script(THOUGHT + "hell", "o"))
    response = client.request("POST", "/v1/responses", json={"input": "Hi", **fields}).json()
    part = response["output"][1]["content"][0]
    assert spelled(part["logprobs"]).decode() == part["text"] == "hello"
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [fields.get("top_logprobs", 0)] * 2
    events = payloads(client.request("POST", "/v1/responses", json={"input": "Hi", "stream": True, **fields}).text)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert ["".join(token["token"] for token in event["logprobs"]) for event in deltas] == ["hell", "o"]
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert [token["token"] for token in done["logprobs"]] == ["hell", "o"]


TOKENS = byte_tokenizer()
PIECES = [
    "hell",
    "o",
    " ",
    "☕",
    "thought\n",
    "call:get_weather{",
    "}",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "x",
    "\n",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from([(), ("lo",), ("☕ ",), ("x", "o ")]), st.data())
def test_whatever_the_parser_makes_of_it(
    prompts: PromptRenderer, said: list[str], stop: tuple[str, ...], data: st.DataObject
) -> None:
    """Tokens cover exactly what is shown, or more only where a stop string cuts."""
    ids = TOKENS.encode("".join(said), add_special_tokens=False).ids
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    parser, stops, likelihoods = OutputParser(tools={"get_weather": {}}), StopStrings(stop), Likelihoods(prompts)
    detokenizer = prompts.detokenizer()
    shown, taken = "", []
    for token_id in ids:
        pieces = detokenizer.push(token_id)
        likelihoods.push(token_id, TokenLogprobs(-1.0), pieces)
        parser.push(pieces)
        content = parser.take().content
        likelihoods.parsed(len(content))
        new = stops.push(content)
        shown += new
        taken += likelihoods.take(len(new))
    pieces = list(detokenizer.finish())
    parser.push(pieces)
    content = parser.finish(complete=False).content
    likelihoods.finish([piece for piece in pieces if isinstance(piece, str)])
    likelihoods.parsed(len(content))
    new = stops.push(content) + stops.finish()
    shown += new
    taken += likelihoods.take(len(new))
    offsets = [token.offset for token in taken]
    assert offsets == sorted(offsets)
    assert all(offset < len(shown) for offset in offsets)
    text = b"".join(bytes(token.chosen.bytes or ()) for token in taken).decode(errors="replace")
    if "call:" not in text:  # a call that is no call is shown as written, quotes included
        assert text.startswith(shown) if stops.hit else text.strip() == shown.strip()
