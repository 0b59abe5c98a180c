"""server.turns_bench with a scripted engine and clock: what is asked, what is timed, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import EngineError, Event, GenerationRequest
from server.prompt import PromptRenderer
from server.turns_bench import Bench
from tests.fakes import FakeEngine, Script, script


class Timed(FakeEngine):
    """A second passes with every step; after a reply there is one step of tidying up."""

    now = 0.0
    idle_steps = 0
    _tidy = False

    @property
    def has_work(self) -> bool:
        return super().has_work or self._tidy

    def step(self) -> list[Event]:
        self.now += 1
        if not super().has_work:
            self._tidy = False
            self.idle_steps += 1
            return []
        ended = len(self.ended)
        events = super().step()
        self._tidy = self._tidy or len(self.ended) > ended
        return events


def bench(prompts: PromptRenderer, said: Any, **options: Any) -> tuple[Bench, list[Timed]]:
    engines: list[Timed] = []

    def build() -> Timed:
        engines.append(Timed(said))
        return engines[-1]

    return Bench(build, lambda info: prompts, clock=lambda: engines[-1].now, **options), engines


def test_each_turn_asks_with_the_whole_history(prompts: PromptRenderer) -> None:
    subject, engines = bench(prompts, [script("warm"), script("one"), script("two", "three")], turns=2, parallel=1)
    info, alone, together = subject.measure(["first?", "second?"])
    assert (info.model_path, together) == ("fake", None)
    (engine,) = engines
    texts = [prompts.decode(request.prompt_ids) for request in engine.requests]
    assert texts[1].endswith("first?<turn|>\n<|turn>model\n")
    assert texts[2] == texts[1] + "one<turn|>\n<|turn>user\nsecond?<turn|>\n<|turn>model\n"
    assert engine.idle_steps == 3, "the engine had its time between turns"
    one, two = alone.turns
    assert (one.seconds, one.seconds_to_first_text, one.denoise_steps) == (3, 3, 3)
    assert (two.seconds, two.seconds_to_first_text, two.turn) == (6, 3, 2)
    assert alone.seconds == 3 + 1 + 6 + 1
    assert alone.tokens == sum(turn.completion_tokens for turn in alone.turns)
    assert engine.closed


def test_conversations_one_after_the_other_and_at_once(
    prompts: PromptRenderer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(request: GenerationRequest) -> Script:
        return script("ok " * (1 + len(request.prompt_ids) % 3))

    subject, engines = bench(prompts, said, turns=3, parallel=2)
    path = tmp_path / "found.json"
    subject.report(None, lambda info: "HEADLINE", path)
    printed = capsys.readouterr().out
    assert "HEADLINE" in printed
    assert "times the throughput, the same replies" in printed
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads(path.read_text())
    assert document["same_replies"] is True
    ways = document["one_after_the_other"], document["at_once"]
    assert [len(way["turns"]) for way in ways] == [48, 48]
    assert [turn["conversation"] for turn in ways[0]["turns"]] == [number for number in range(16) for _ in range(3)]
    # always two at a time, the next as soon as one is over
    pairs = [(first, first + 1) * 3 for first in range(0, 16, 2)]
    assert [turn["conversation"] for turn in ways[1]["turns"]] == [number for pair in pairs for number in pair]
    assert document["throughput_ratio"] == pytest.approx(ways[0]["seconds"] / ways[1]["seconds"])
    # half of those one after the other, those at once, the other half: a warm-up and its conversations each
    assert [len(engine.requests) for engine in engines] == [1 + 24, 1 + 48, 1 + 24]
    assert len({request.prompt_ids for request in engines[1].requests}) == 49, "no two conversations ask the same"


def test_other_replies_are_told(prompts: PromptRenderer) -> None:
    count = iter(range(100))
    subject, _ = bench(prompts, lambda request: script(f"reply {next(count)}"), turns=1, parallel=2)
    _, alone, together = subject.measure(None)
    assert together is not None
    assert alone.replies.keys() == together.replies.keys()
    assert alone.replies != together.replies


def test_a_conversation_that_outgrows_the_context_or_fails(prompts: PromptRenderer) -> None:
    subject = Bench(lambda: Timed([script("x" * 90)], context_length=150), lambda info: prompts, turns=9, parallel=1)
    with pytest.raises(EngineError, match=r"turn 2 has \d+ tokens of history, more than the context of 150"):
        subject.measure(["some question?"])
    failing = script("", reason="error", error="broken")
    subject, _ = bench(prompts, [script("warm"), failing], turns=1, parallel=1)
    with pytest.raises(EngineError, match="gave up on turn 1: broken"):
        subject.measure(["?"])
