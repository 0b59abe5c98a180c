"""Infill: the canvases that are tried, which one is kept, and the three wire formats that ask for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine import CanvasRead, CanvasRequest
from server.bridge import Bridge
from server.chat import ChatService
from server.exchange import ChatTask
from server.infill import LONG, RIGHT_CONTEXT, SHORT, open_reply
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, byte_tokenizer, script

Serve = Callable[..., Any]
TOKENS = byte_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENS.encode(text, add_special_tokens=False).ids


def filler(text: str) -> Callable[[CanvasRequest], CanvasRead]:
    """A model that knows what belongs into the gap, is sure of it, and unsure of any other length."""
    right = ids_of(text)

    def read(request: CanvasRequest) -> CanvasRead:
        free = request.free
        if request.allowed is not None:  # how likely is what was found?
            held = list(itertools.takewhile(lambda token: token is not None, request.canvas))
            gap = held or [token for (token,) in request.allowed]
            score = 0.0 if gap == right else -2.0 - abs(len(gap) - len(right)) / 100
            return CanvasRead(request_id=request.id, token_ids=(), logprobs=(), allowed=((score,),) * free, steps=1)
        gap = (right + ids_of("?") * free)[:free]
        sure = 0.0 if free == len(right) else -2.0 - abs(free - len(right)) / 100
        held = [token for token in request.canvas if token is not None]
        return CanvasRead(
            request_id=request.id, token_ids=(*gap, *held), logprobs=(sure,) * len(request.canvas), steps=2
        )

    return read


def tries(client: Any) -> list[int]:
    """The gap lengths that were tried."""
    return [request.free for request in client.engine.canvases if request.allowed is None]


def complete(client: Any, **fields: Any) -> Any:
    body = {"prompt": "def f():", "suffix": " 1", "max_tokens": 40, **fields}
    return client.request("POST", "/v1/completions", json=body)


@pytest.mark.parametrize("text", ["x", " return", "\n    value =", "a" * 9, "a longer piece of text"])
def test_the_likeliest_length_is_kept(serve: Serve, text: str) -> None:
    answer = complete(serve(reader=filler(text))).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert answer["usage"]["completion_tokens"] == len(ids_of(text))
    assert answer["usage"]["prompt_tokens"] == len("<") + len("def f():") + len(ids_of(" 1")) + len("<")


def test_the_canvas(serve: Serve) -> None:
    client = serve(reader=filler("xyz"))
    complete(client)
    assert tries(client) == list(SHORT), "a short one is convincing"
    request = client.engine.canvases[2]
    assert request.prompt_ids == (2, *ids_of("def f():"))
    assert request.canvas == (None, None, None, *ids_of(" 1"), 1), "the suffix, and the end of the text"
    assert request.allowed is None
    assert {1, 106, 50, 100} <= {token for token, bias in request.sampling.logit_bias if bias == -100}


def test_of_equally_likely_lengths_the_shortest_is_kept(serve: Serve) -> None:
    def read(request: CanvasRequest) -> CanvasRead:
        if request.allowed is not None:
            held = list(itertools.takewhile(lambda token: token is not None, request.canvas))
            score = {3: -0.005, 6: 0.0, 2: -0.5}.get(len(held) or request.free, -2.0)
            return CanvasRead(
                request_id=request.id, token_ids=(), logprobs=(), allowed=((score,),) * request.free, steps=1
            )
        ids = ids_of("abcdefgh")[: request.free] + [token for token in request.canvas if token is not None]
        return CanvasRead(request_id=request.id, token_ids=tuple(ids), logprobs=(0.0,) * len(ids), steps=1)

    assert complete(serve(reader=read)).json()["choices"][0]["text"] == "abc"


def test_long_gaps_are_tried_only_where_no_short_one_fits(serve: Serve) -> None:
    client = serve(reader=filler("y" * 17))
    complete(client)
    lengths = tries(client)
    assert lengths[: len(SHORT)] == list(SHORT)
    assert 17 in lengths
    assert max(lengths) <= 40
    assert len(lengths) == len(set(lengths))


def test_a_long_suffix_fills_the_canvas_and_some_of_it_always_has_room(serve: Serve) -> None:
    client = serve(reader=filler("no"))
    complete(client, suffix="s" * 500, max_tokens=500)
    for request in client.engine.canvases:
        assert len(request.canvas) <= 64
        assert request.canvas[-1] == ids_of("s")[0]
    client = serve(reader=lambda request: None)
    answer = complete(client, suffix="s" * 500, max_tokens=500).json()
    assert max(request.free for request in client.engine.canvases) <= 64 - RIGHT_CONTEXT
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert max(LONG[0]) <= 48


@pytest.mark.parametrize(("prompt", "begin"), [("a ", "a"), ("a   ", "a"), ("  ", "  "), ("", ""), ("a\n", "a\n")])
def test_spaces_at_the_end_of_the_prompt_are_part_of_the_gap(serve: Serve, prompt: str, begin: str) -> None:
    spaces = prompt[len(begin) :]
    client = serve(reader=filler(spaces + "b"))
    answer = complete(client, prompt=prompt).json()
    assert client.engine.canvases[0].prompt_ids == (2, *ids_of(begin))
    assert answer["choices"][0]["text"] == "b"


def test_control_tokens_count_on_both_sides(serve: Serve) -> None:
    client = serve(reader=filler("b"))
    complete(client, prompt="<|turn>model\nThe", suffix=" end.<turn|>")
    assert client.engine.canvases[0].prompt_ids[:2] == (2, 105)
    assert client.engine.canvases[0].canvas[-1] == 106, "which ends the text already"


def test_choices_stop_strings_and_streams(serve: Serve) -> None:
    fields = {"prompt": [[2, 120], [2, 121]], "n": 2, "stop": ["c"]}
    client = serve(reader=filler("bcd"))
    choices = complete(client, **fields).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(index, "b") for index in range(4)]
    seeds = {request.sampling.seed for request in client.engine.canvases}
    assert len(seeds) == 4
    lines = complete(client, **fields, stream=True, stream_options={"include_usage": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "bbbb"
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert "data: [DONE]" in lines


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"suffix": 5}, "suffix"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"logit_bias": {"600": 1}}, "logit_bias"),
    ],
)
def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    for streamed in (False, True):
        answer = complete(serve(), stream=streamed, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_empty_suffix_is_none(serve: Serve) -> None:
    assert complete(serve(script("Hi")), suffix="").json()["choices"][0]["text"] == "Hi"


def payloads(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_llama_cpp(serve: Serve) -> None:
    client = serve(reader=filler("xyz"))
    body = {
        "input_extra": [{"filename": "a.py", "text": "import b"}],
        "input_prefix": "def f(",
        "prompt": "a",
        "input_suffix": "):",
        "n_predict": 8,
        "top_k": 40,
        "samplers": ["top_k", "infill"],
        "cache_prompt": True,
        "t_max_predict_ms": 500,
        "stop": ["z"],
    }
    answer = client.request("POST", "/infill", json=body).json()
    assert (answer["content"], answer["stop"], answer["stop_type"]) == ("xy", True, "word")
    assert (answer["stopping_word"], answer["tokens_predicted"]) == ("z", 3)
    assert client.engine.canvases[0].prompt_ids == (2, *ids_of("a.py\nimport b\ndef f(a"))
    text = client.request("POST", "/infill", json={**body, "stream": True}).text
    first, last = payloads(text)
    assert (first["content"], first["stop"], last["content"], last["stop"]) == ("xy", False, "", True)
    assert "[DONE]" not in text


@pytest.mark.parametrize("bound", [-1, None])
def test_llama_cpps_bounds(serve: Serve, bound: int | None) -> None:
    client = serve(reader=filler("x"))
    assert client.request("POST", "/infill", json={"n_predict": bound}).json()["content"] == "x"
    nothing = client.request("POST", "/infill", json={"n_predict": 0, "input_prefix": "a"}).json()
    assert (nothing["content"], nothing["stop_type"]) == ("", "limit")
    assert client.request("POST", "/infill", json={"n_predict": -2}).status_code == 400
    assert client.request("POST", "/infill", json={"input_prefix": 5}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/fim/completions", "/fim/completions"])
def test_continue(serve: Serve, path: str) -> None:
    client = serve(reader=filler("xyz"))
    body = {"model": "demo", "prompt": "a", "suffix": "b", "max_tokens": 20, "stop": ["\n\n"]}
    answer = client.request("POST", path, json=body).json()
    assert answer["choices"][0]["message"]["content"] == "xyz"
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    chunks = payloads(client.request("POST", path, json=streamed).text)
    assert [part["delta"].get("content") for chunk in chunks for part in chunk["choices"]] == ["", "xyz", None]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert client.request("POST", path, json={"suffix": "b"}).status_code == 400


def test_whoever_stops_waiting_stops_the_work(prompts: PromptRenderer) -> None:
    def slow(request: CanvasRequest) -> CanvasRead:
        time.sleep(0.05)
        return filler("abc")(request)

    engine = FakeEngine([], reader=slow)
    task = ChatTask(prompts=("a",), suffix="b", max_tokens=40)

    async def leave(service: ChatService) -> None:
        reply = await open_reply(service, task)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reply.fold(), 0.12)
        await reply.close()

    with Bridge(engine) as bridge:
        asyncio.run(leave(ChatService(bridge, prompts, ["demo"])))
    assert len(engine.canvases) == len(SHORT)
    assert engine.cancelled, "what was waiting is not read any more"
    assert len(engine.ended) == len(SHORT)
