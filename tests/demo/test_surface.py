"""What requests can ask for beyond text, with the bundled model: logprobs, bans, penalties, presets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import EngineOptions, build_engine
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects import openai_chat
from server.infill import open_reply
from server.prompt import PromptRenderer

CHECKPOINT = Path(__file__).parents[2] / "engine" / "demo" / "checkpoint"
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def service() -> Iterator[ChatService]:
    with Bridge(build_engine(EngineOptions(model=str(CHECKPOINT), device="cpu", progress=False))) as bridge:
        yield ChatService(bridge, PromptRenderer.from_folder(CHECKPOINT), ["demo"])


@pytest.fixture
def ask(service: ChatService) -> Ask:
    """ask(question, **fields) -> the body of a chat completion"""

    async def answer(body: dict[str, Any]) -> Any:
        asked = openai_chat.read(json.dumps(body).encode())
        reply = await open_reply(service, asked.task)
        try:
            return await asked.body(reply)
        finally:
            await reply.close()

    def run(question: str, **fields: Any) -> Any:
        return asyncio.run(answer({"messages": [{"role": "user", "content": question}], "seed": 1, **fields}))

    return run


def said(body: Any) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


def test_logprobs_are_of_what_was_said(ask: Ask) -> None:
    body = ask("What is 17 + 25?", logprobs=True, top_logprobs=3)
    tokens = body["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == said(body)
    for token in tokens:
        first, *others = token["top_logprobs"]
        assert (first["token"], first["logprob"]) == (token["token"], token["logprob"]), "the argmax is delivered"
        assert first["logprob"] >= max(other["logprob"] for other in others)
        assert -1 < token["logprob"] <= 0


def test_a_banned_token_is_not_said(ask: Ask, service: ChatService) -> None:
    for character in "4=":
        banned = {str(token): -100 for token in service.prompts.encode(character)}
        assert character in said(ask("What is 17 + 25?", max_tokens=20))
        assert character not in said(ask("What is 17 + 25?", max_tokens=20, logit_bias=banned))


def test_penalties_make_repeating_rarer(ask: Ask) -> None:
    def most(**penalties: float) -> int:
        words = said(ask("Write a story about Mia and a fox.", max_tokens=120, **penalties)).split()
        return max(words.count(word) for word in words)

    assert most(frequency_penalty=2.0, presence_penalty=2.0) < most()


def test_presets_cost_and_save_steps(ask: Ask) -> None:
    steps = {
        preset: sum(ask(f"What is {a} + 25?", easel={"preset": preset})["easel"]["steps"] for a in range(10, 20))
        for preset in ("quality", "balanced", "fast")
    }
    assert steps["fast"] < steps["balanced"] < steps["quality"]


def test_a_bound_on_steps_ends_a_reply_that_needs_more(ask: Ask) -> None:
    body = ask("Write a story about Mia and a fox.", easel={"max_denoising_steps": 1})
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["easel"]["steps"] == 2, "two attempts of one step"
