"""The older completions: prompts in every form, echo, choices, and chunks that add up to the body."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import byte_tokenizer, script

Serve = Callable[..., Any]
TOKENIZER = byte_tokenizer()


def ask(client: Any, prompt: Any = "Hi", **fields: Any) -> Any:
    return client.request("POST", "/v1/completions", json={"prompt": prompt, **fields})


def chunks(answer: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def prompts(client: Any) -> list[str]:
    return [TOKENIZER.decode(list(each.prompt_ids), skip_special_tokens=False) for each in client.engine.requests]


@pytest.mark.parametrize(
    "fields",
    [{}, {"echo": True}, {"n": 3}, {"stop": "lo"}, {"max_tokens": 2}, {"prompt": ["a", "b"], "n": 2, "echo": True}],
)
def test_the_chunks_add_up_to_the_body(serve: Serve, fields: dict[str, Any]) -> None:
    client = serve(script("Hel", "lo"))
    body = ask(client, **fields).json()
    for options in ({}, {"stream_options": {"include_usage": True}}):
        parts = chunks(ask(client, **fields, **options, stream=True))
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        for choice in (choice for part in parts for choice in part["choices"]):
            assert choice["index"] not in reasons
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
        assert texts == {choice["index"]: choice["text"] for choice in body["choices"]}
        assert reasons == {choice["index"]: choice["finish_reason"] for choice in body["choices"]}
        assert len({(part["id"], part["created"], part["object"]) for part in parts}) == 1
        assert ["usage" in part for part in parts] == [False] * (len(parts) - 1) + [bool(options)]
        assert "easel" in parts[-1]
        if options:
            assert parts[-1]["choices"] == []
            assert parts[-1]["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]


def test_prompts_in_every_form(serve: Serve) -> None:
    client = serve(script("x"))
    for prompt in ("ab", ["ab", "c"], [2, 3, 4], [[2, 3], [4]]):
        assert ask(client, prompt).status_code == 200
    texts = ["<bos>ab", "<bos>ab", "<bos>c"]
    assert prompts(client)[:3] == texts
    assert [list(each.prompt_ids) for each in client.engine.requests][3:] == [[2, 3, 4], [2, 3], [4]]


def test_control_tokens_of_the_prompt_count_and_bos_is_not_doubled(serve: Serve) -> None:
    client = serve(script("x"))
    ask(client, "<bos><|turn>user\nHi<turn|>\n<|turn>model\n")
    ids = list(client.engine.requests[0].prompt_ids)
    assert (ids.count(2), ids.count(105), ids.count(106)) == (1, 2, 1)


def test_choices_are_numbered_by_prompt(serve: Serve) -> None:
    client = serve(script("a"), script("b"), script("c"), script("d"))
    body = ask(client, ["1", "2"], n=2, echo=True, seed=7).json()
    assert [choice["text"] for choice in body["choices"]] == ["1a", "1b", "2c", "2d"]
    assert [each.sampling.seed for each in client.engine.requests] == [7, 8, 7, 8]
    assert body["usage"] | {} == {
        "prompt_tokens": 4,
        "completion_tokens": 8,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_nothing_is_told_apart_and_no_marker_is_shown(serve: Serve) -> None:
    client = serve(script("<|channel>thought\nhm\n<channel|>Yes<|tool_call>call:f{}<tool_call|>"))
    (choice,) = ask(client, max_tokens=500).json()["choices"]
    assert choice["text"] == "thought\nhm\nYescall:f{}"


def test_sixteen_tokens_unless_told_otherwise(serve: Serve) -> None:
    client = serve(script("x"))
    ask(client)
    ask(client, max_tokens=99)
    assert [each.max_tokens for each in client.engine.requests] == [16, 99]


def test_echo_of_ids_is_their_text(serve: Serve) -> None:
    ids = TOKENIZER.encode("Hi é<turn|>", add_special_tokens=False).ids
    (choice,) = ask(serve(script("x")), ids, echo=True).json()["choices"]
    assert choice["text"] == "Hi é<turn|>x"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    answer = ask(serve(script("x")), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_values_that_mean_off(serve: Serve) -> None:
    answer = ask(serve(script("x")), suffix=None, logprobs=None, best_of=2, n=2, echo=False, user="me", logit_bias={})
    assert answer.status_code == 200


def test_a_prompt_that_is_too_long_names_the_prompt(serve: Serve) -> None:
    error = ask(serve(script("x"), context_length=10), "x" * 50).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "(51 in the prompt, 16 in the completion)" in error["message"]
