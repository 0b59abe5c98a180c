"""The flow: one stream, its fold, seeds, limits, stop strings, several choices, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from engine import GenerationRequest
from server.bridge import Bridge
from server.chat import ChatService, Folded, fold
from server.errors import ApiError
from server.exchange import ChatTask, ChoiceDone, Delta, ReplyDone, StreamItem
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, script

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'

Answer = tuple[list[StreamItem], Folded]


@pytest.fixture
def answer(prompts: PromptRenderer) -> Callable[..., Any]:
    """answer(engine, **task fields) -> the stream of the reply, and its fold."""

    def run(engine: FakeEngine, **fields: Any) -> Answer:
        task = ChatTask(messages=({"role": "user", "content": "Hi"},), **fields)

        async def stream() -> Answer:
            reply = await ChatService(bridge, prompts, ["demo"]).open(task)
            async with aclosing(reply.stream()) as items:
                taken = [item async for item in items]
            await reply.close()

            async def again() -> Any:
                for item in taken:
                    yield item

            return taken, await fold(again(), reply.choices)

        with Bridge(engine) as bridge:
            return asyncio.run(stream())

    return run


def one(folded: Folded) -> Any:
    (choice,) = folded.choices
    return choice


def test_the_stream_ends_with_choice_done_and_reply_done(answer: Any) -> None:
    items, folded = answer(FakeEngine([script("Hel", "lo")]))
    assert [type(item) for item in items] == [Delta, Delta, ChoiceDone, ReplyDone]
    assert one(folded).content == "Hello"
    assert one(folded).finish_reason == "stop"
    done = folded.done
    assert (done.canvases, done.steps, done.completion_tokens) == (2, 6, 6)  # "He" is no merge; the eos counts
    assert done.tokens_per_forward == 1.0
    assert 0 < done.seconds_to_first_text <= done.seconds


def test_reasoning_content_and_calls_are_kept_apart(answer: Any) -> None:
    text = "<|channel>thought\nhm, the wea", "ther\n<channel|>Let me see." + CALL[:20], CALL[20:]
    _, folded = answer(FakeEngine([script(*text, stop_id=50)]), tools=(TOOL,))
    choice = one(folded)
    assert (choice.reasoning, choice.content) == ("hm, the weather", "Let me see.")
    assert [(call.name, call.arguments, call.index) for call in choice.tool_calls] == [
        ("get_weather", '{"city": "Paris"}', 0)
    ]
    assert choice.finish_reason == "tool_calls"
    assert 0 < folded.done.reasoning_tokens < folded.done.completion_tokens


def test_length_is_told_also_when_a_call_is_cut(answer: Any) -> None:
    _, folded = answer(FakeEngine([script(CALL + CALL[:20], reason="length")]), tools=(TOOL,))
    assert one(folded).finish_reason == "length"
    assert len(one(folded).tool_calls) == 1
    _, folded = answer(FakeEngine([script("four")]), max_tokens=2)
    assert (one(folded).content, one(folded).finish_reason) == ("fo", "length")


def test_without_parallel_calls_the_first_is_kept_and_the_work_stops(answer: Any) -> None:
    engine = FakeEngine([script(CALL + CALL, *["more"] * 1000, step_seconds=0.005)])
    _, folded = answer(engine, tools=(TOOL,), parallel_tool_calls=False, stop=("Par",))
    assert len(one(folded).tool_calls) == 1
    assert one(folded).finish_reason == "tool_calls"
    assert engine.steps < 1000  # of 3000: whoever reads may be slow


def test_text_held_back_for_a_stop_string_is_not_lost_before_a_call(answer: Any) -> None:
    engine = FakeEngine([script("hel" + CALL, *["more"] * 50)])
    _, folded = answer(engine, tools=(TOOL,), parallel_tool_calls=False, stop=("help",))
    assert (one(folded).content, one(folded).finish_reason) == ("hel", "tool_calls")


def test_a_stop_string_across_canvases_ends_the_engine_work(answer: Any) -> None:
    engine = FakeEngine([script("Hello wo", "rld and", *["more"] * 1000, step_seconds=0.005)])
    _, folded = answer(engine, stop=("world", "never"))
    assert one(folded).content == "Hello "
    assert one(folded).finish_reason == "stop"
    assert engine.cancelled
    assert engine.steps < 1000  # of 3000: whoever reads may be slow
    assert folded.done.canvases >= 2


def test_a_stop_string_is_no_business_of_the_reasoning(answer: Any) -> None:
    _, folded = answer(FakeEngine([script("<|channel>thought\nworld\n<channel|>Hello")]), stop=("world",))
    assert (one(folded).reasoning, one(folded).content) == ("world", "Hello")


def test_a_turn_closed_inside_a_canvas_ends_the_engine_work(answer: Any) -> None:
    engine = FakeEngine([script("Bye<turn|>", *["noise"] * 1000, step_seconds=0.005)])
    _, folded = answer(engine)
    assert (one(folded).content, one(folded).finish_reason) == ("Bye", "stop")
    assert engine.steps < 1000  # of 3000: whoever reads may be slow


def test_a_canvas_that_shows_nothing_makes_no_delta(answer: Any) -> None:
    items, folded = answer(FakeEngine([script("<|channel>", "thought\n", "<channel|>Yes")]))
    assert [item.content for item in items if isinstance(item, Delta)] == ["Yes"]
    assert folded.done.canvases == 3


def seeds(engine: FakeEngine) -> list[int]:
    return [request.sampling.seed for request in engine.requests]


def test_seeds(answer: Any) -> None:
    engine = FakeEngine([script("a")])
    _, folded = answer(engine, seed=2**64 - 1, choices=3)
    assert seeds(engine) == [2**64 - 1, 0, 1]
    assert folded.done.seed == 2**64 - 1
    _, folded = answer(FakeEngine([script("a")]), temperature=0.0)
    assert folded.done.seed == 0
    drawn = {answer(FakeEngine([script("a")]))[1].done.seed for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_sampling_and_limits_reach_the_engine(answer: Any) -> None:
    engine = FakeEngine([script("a")], context_length=100)
    answer(engine, temperature=0.7, top_k=5, top_p=0.9, max_tokens=50)
    answer(engine, max_tokens=5000)
    answer(engine)
    first, second, third = engine.requests
    assert (first.sampling.temperature, first.sampling.top_k, first.sampling.top_p) == (0.7, 5, 0.9)
    assert first.max_tokens == 50
    left = 100 - len(first.prompt_ids)
    assert second.max_tokens == third.max_tokens == left


def test_choices_are_told_apart_and_counted_together(answer: Any) -> None:
    def say(request: GenerationRequest) -> Script:
        return script("x" * (int(request.id[-1]) + 1))

    _, folded = answer(FakeEngine(say), choices=3)
    assert [choice.content for choice in folded.choices] == ["x", "xx", "xxx"]
    assert folded.done.completion_tokens == 1 + 2 + 3 + 3
    assert folded.done.prompt_tokens < 30


def test_an_unknown_model_is_a_404_that_lists_the_known(answer: Any) -> None:
    with pytest.raises(ApiError) as caught:
        answer(FakeEngine([script("a")]), model="gpt-5")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert "'demo'" in caught.value.message


def test_a_prompt_longer_than_the_context(answer: Any) -> None:
    with pytest.raises(ApiError) as caught:
        answer(FakeEngine([script("a")], context_length=10), max_tokens=7)
    error = caught.value
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "This model's maximum context length is 10 tokens. However, you requested" in error.message
    assert "The longest prompt that fits has 9 tokens." in error.message
    assert "7 in the completion" in error.message


def test_the_engine_may_refuse_for_length_too(answer: Any) -> None:
    class Tighter(FakeEngine):
        def submit(self, request: GenerationRequest) -> None:
            self.context_length = 5
            super().submit(request)

    with pytest.raises(ApiError) as caught:
        answer(Tighter([script("a")]))
    assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_is_a_429_and_the_other_choices_are_cancelled(answer: Any) -> None:
    engine = FakeEngine([script(*["x"] * 1000, step_seconds=0.001)], max_waiting=1)
    with pytest.raises(ApiError) as caught:
        answer(engine, choices=4)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers["Retry-After"]
    assert sorted(engine.ended) == sorted(request.id for request in engine.requests)


def test_a_generation_that_fails_is_a_500_not_to_be_retried(answer: Any) -> None:
    with pytest.raises(ApiError) as caught:
        answer(FakeEngine([script("a", reason="error", error="non-finite logits")]))
    assert (caught.value.status, caught.value.headers["x-should-retry"]) == (500, "false")
    assert "non-finite logits" in caught.value.message


def test_closing_a_reply_early_cancels_every_choice(prompts: PromptRenderer) -> None:
    engine = FakeEngine([Script([[173]] * 10_000, steps=1, step_seconds=0.001)])

    async def run() -> None:
        task = ChatTask(messages=({"role": "user", "content": "Hi"},), choices=3)
        reply = await ChatService(bridge, prompts, ["demo"]).open(task)
        async with aclosing(reply.stream()) as items:
            await anext(items)
        await reply.close()
        await reply.close()
        assert len(asyncio.all_tasks()) <= 4  # this one, and cancelled waits that end with the next turn of the loop
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with Bridge(engine) as bridge:
        asyncio.run(run())
    assert len(engine.ended) == 3


def test_a_service_needs_a_name(prompts: PromptRenderer) -> None:
    with pytest.raises(ValueError, match="name"):
        ChatService(Bridge(FakeEngine([script("a")])), prompts, [])
