"""Measure infill and decisions on the demo model, through the whole server but HTTP: right gaps, and calibration.

    python -m tests.bench.held_canvases --prompts 200 [--checkpoint DIR] [--device cuda] [--wrong 10]

Contents are of the test split: never seen in training. A gap is right if its text is the one that was taken out; a
missing operand, which takes arithmetic backwards, is counted apart. Odds are known exactly, so the error is the mean
|probability - odds| over all options of all questions; certain questions are those whose odds are 0 and 1, and right
means that the likelier option is the true one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

from engine import EngineOptions, build_engine
from engine.demo import corpus, decisions, documents
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects import completions
from server.dialects import decisions as dialect
from server.infill import open_reply
from server.prompt import PromptRenderer

HERE = Path(__file__).parents[2] / "engine" / "demo" / "checkpoint"


def held(key: tuple[object, ...]) -> bool:
    return corpus.heldout(*key)


async def infill(service: ChatService, count: int) -> list[tuple[bool, bool, str, int]]:
    """(right, whether a sum's operand is missing, what was asked and answered, denoise steps) of `count` gaps."""
    results = []
    for index in range(count):
        before, middle, after = documents.infill(random.Random(f"infill/{index}"), held)
        body = {"prompt": before, "suffix": after, "seed": index, "max_tokens": 24}
        reply = await open_reply(service, completions.read(json.dumps(body).encode()).task)
        folded = await reply.fold()
        text = folded.choices[0].content
        shown = f"{before!r} [{middle}] {after!r} -> {text!r}"
        operand = middle.isdigit() and after.startswith((" + ", " - ", " = "))
        results.append((text.strip() == middle.strip(), operand, shown, folded.done.steps))
    return results


def _asked(question: decisions.Question) -> dict[str, Any]:
    options = question.options
    if options == ("false", "true"):
        return {"type": "predicate", "instructions": question.instructions}
    if options[0].startswith('"'):
        choices = [{"value": json.loads(option)} for option in options]
        return {"type": "choice", "instructions": question.instructions, "choices": choices}
    return {"type": "score", "instructions": question.instructions, "levels": [{"label": each} for each in options]}


async def decide(service: ChatService, count: int, *, joint: bool) -> list[tuple[tuple[float, ...], list[float]]]:
    """(odds, probabilities) of every question of `count` inputs."""
    results = []
    index = 0
    while count:
        drawn = decisions.draw(random.Random(f"decide/{index}"))
        index += 1
        if not held(drawn.key) or (joint and len(drawn.questions) == 1):
            continue
        count -= 1
        body = {"input": drawn.input, "questions": [_asked(question) for question in drawn.questions], "joint": joint}
        answers = (await dialect.decide(service, json.dumps(body).encode()))["answers"]
        for question, answer in zip(drawn.questions, answers, strict=True):
            if answer["type"] == "predicate":
                found = [1 - answer["probability"], answer["probability"]]
            else:
                found = [each["probability"] for each in answer["probabilities"]]
            results.append((question.odds, found))
    return results


def error(results: list[tuple[tuple[float, ...], list[float]]]) -> float:
    """Mean |probability - odds|."""
    gaps = [abs(a - b) for odds, found in results for a, b in zip(odds, found, strict=True)]
    return sum(gaps) / len(gaps)


def certain(results: list[tuple[tuple[float, ...], list[float]]]) -> tuple[int, int]:
    """(right, all) of the questions with one possible answer."""
    sure = [(odds.index(1.0), found) for odds, found in results if 1.0 in odds]
    return sum(found.index(max(found)) == place for place, found in sure), len(sure)


async def measure(service: ChatService, count: int, wrong: int) -> None:
    """Print the table."""
    began = time.monotonic()
    gaps = await infill(service, count)
    for title, wanted in (("the middle of a template", False), ("an operand of a sum or difference", True)):
        own = [ok for ok, operand, _, _ in gaps if operand == wanted]
        print(f"infill, {title}: {sum(own)} of {len(own)} right ({100 * sum(own) / max(1, len(own)):.1f} %)")
    print(f"    {sum(steps for *_, steps in gaps) / count:.1f} denoise steps a gap, all lengths tried together")
    for _, _, shown, _ in [each for each in gaps if not each[0]][:wrong]:
        print(f"    {shown}")
    for joint in (False, True):
        results = await decide(service, count, joint=joint)
        ok, all_ = certain(results)
        name = "decisions, all of an input on one canvas" if joint else "decisions, one pass each"
        print(f"{name}: mean |p - odds| {error(results):.3f} over {len(results)}; certain ones right {ok} of {all_}")
    print(f"{time.monotonic() - began:.0f} s")


def main() -> None:
    """Parse the command line and measure."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, default=HERE)
    p.add_argument("--device", default="auto")
    p.add_argument("--prompts", type=int, default=200)
    p.add_argument("--wrong", type=int, default=0, help="show so many wrong gaps")
    a = p.parse_args()
    engine = build_engine(EngineOptions(model=str(a.checkpoint), device=a.device, progress=False))
    with Bridge(engine) as bridge:
        asyncio.run(
            measure(ChatService(bridge, PromptRenderer.from_folder(a.checkpoint), ("demo",)), a.prompts, a.wrong)
        )


if __name__ == "__main__":
    main()
