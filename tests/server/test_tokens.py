"""Tokens of a text and back, and the rendered prompt, in the forms of two servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.access import Keys
from server.app import AppSettings
from tests.fakes import byte_tokenizer, script

Serve = Callable[..., Any]
TOKENIZER = byte_tokenizer()
MESSAGES = [{"role": "user", "content": "Hi <turn|>"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "string"}}}}}  # fmt: skip  # noqa: E501


@pytest.fixture
def post(serve: Serve) -> Callable[..., Any]:
    client = serve(script("x"))
    return lambda path, **body: client.request("POST", path, json=body)


def test_tokens_of_a_prompt_are_those_a_completion_gets(post: Any, serve: Serve) -> None:
    client = serve(script("x"))
    for text in ("Hi", "<bos>Hi", "a<turn|>b", "é漢🙂", ""):
        answer = client.request("POST", "/tokenize", json={"prompt": text}).json()
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 4096)
        client.request("POST", "/v1/completions", json={"prompt": text})
        assert tuple(answer["tokens"]) == client.engine.requests[-1].prompt_ids
    assert post("/tokenize", prompt="Hi", add_special_tokens=False).json()["tokens"] == TOKENIZER.encode("Hi").ids


def test_tokens_of_a_conversation_are_those_a_chat_gets(serve: Serve) -> None:
    client = serve(script("x"))
    body = {"messages": MESSAGES, "tools": [TOOL], "model": "demo"}
    ids = client.request("POST", "/tokenize", json=body).json()["tokens"]
    client.request("POST", "/v1/chat/completions", json=body)
    assert tuple(ids) == client.engine.requests[0].prompt_ids


def test_the_form_of_llama_cpp(post: Any) -> None:
    assert post("/tokenize", content="<turn|>").json()["tokens"] == [106]
    assert len(post("/tokenize", content="<turn|>", parse_special=False).json()["tokens"]) > 1
    assert post("/tokenize", content="x", add_special=True).json()["tokens"][0] == 2
    pieces = post("/tokenize", content="a é", with_pieces=True).json()["tokens"]
    assert [set(each) for each in pieces] == [{"id", "piece"}] * len(pieces)
    assert pieces[0]["piece"] == "a"


def test_token_strings_on_request(post: Any) -> None:
    assert post("/tokenize", prompt="ab", return_token_strs=True).json()["token_strs"] == ["<bos>", "a", "b"]
    assert post("/tokenize", prompt="ab").json()["token_strs"] is None


@pytest.mark.parametrize("text", ["Hi", "<bos><|turn>user\nHi<turn|>\n", "é漢🙂 a  b"])
def test_tokens_go_back_to_text(post: Any, text: str) -> None:
    ids = post("/tokenize", content=text).json()["tokens"]
    assert post("/detokenize", tokens=ids).json() == {"prompt": text, "content": text}


def test_the_rendered_prompt(post: Any) -> None:
    answer = post("/apply-template", messages=MESSAGES, reasoning_effort="low").json()["prompt"]
    assert answer == "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi <turn|><turn|>\n<|turn>model\n"
    with_tools = post("/apply-template", messages=MESSAGES, tools=[TOOL]).json()["prompt"]
    assert '{type:<|"|>string<|"|>}' in with_tools
    assert "declaration" not in post("/apply-template", messages=MESSAGES, tools=[TOOL], tool_choice="none").text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [99_999]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/apply-template", {}),
        ("/apply-template", {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}),
    ],
)
def test_what_is_refused(post: Any, path: str, body: dict[str, Any]) -> None:
    answer = post(path, **body)
    assert answer.status_code in (400, 404)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_key_is_asked_for(serve: Serve) -> None:
    client = serve(script("x"), settings=AppSettings(keys=Keys(["k"])))
    for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert client.request("POST", path, json={}).status_code == 401
