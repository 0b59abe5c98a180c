"""Measure the demo model: right replies, steps and canvases at the step limit, by family, on held-out prompts.

    python -m engine.demo.evaluate --prompts 1200 --processes 2             # through this engine
    python -m engine.demo.evaluate --prompts 1200 --engine transformers     # the same prompts through transformers
    python -m engine.demo.evaluate --prompts 600 --temperatures 0,0.1,0.7,1,2
    python -m engine.demo.evaluate --prompts 1200 --presets quality,balanced,fast   # accuracy and steps of each
    python -m engine.demo.evaluate --prompts 1200 --quantize none,fp8,nvfp4,int4  # accuracy and steps a format costs

Knows the corpus's judge and the engine's interface; nothing of how either works.

Invariant: every prompt counts, also one whose reply failed; nothing is tried twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.demo import corpus
from engine.demo.dataset import row_of
from engine.engine import DiffusionEngine
from engine.interface import PRESETS, CanvasDone, EngineOptions, Finished, GenerationRequest, Sampling

HERE = Path(__file__).with_name("checkpoint")
EVALUATION_SEED = 5  # of the corpus; training uses others, and other contents besides
MAX_TOKENS = 512


@dataclass(frozen=True)
class Reply:
    """What one prompt led to."""

    family: str
    question: str
    text: str
    right: bool
    steps: tuple[int, ...]  # denoise steps of each canvas delivered
    redrawn: int  # canvases that reached the step limit once
    given_up: bool  # a canvas reached it twice, or the reply failed
    tokens: int


@dataclass(frozen=True)
class Report:
    """Shares and means over all replies, and by family."""

    prompts: int
    right: dict[str, float]
    steps: dict[str, float]
    at_limit: float  # share of canvases that reached the step limit
    tokens_per_step: float
    seconds: float
    wrong: list[Reply] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to answer. `device` and `quantize` as in EngineOptions; `engine` is a key of ENGINES, `preset` of PRESETS."""

    checkpoint: Path
    device: str = "cpu"
    temperature: float = 1.0
    preset: str = "balanced"
    engine: str = "easel"
    quantize: str | None = None
    quantize_dense: str | None = None


Answerer = Callable[[corpus.Example, list[int], int], Reply]


class EngineAnswerer:
    """Answers through this engine."""

    def __init__(self, setup: Setup) -> None:
        options = EngineOptions(
            model=str(setup.checkpoint),
            device=setup.device,
            quantize=setup.quantize,
            quantize_dense=setup.quantize_dense,
            progress=False,
        )
        self._engine = DiffusionEngine.from_options(options)
        self._tokenizer = AutoTokenizer.from_pretrained(setup.checkpoint)
        self._temperature = setup.temperature
        self._schedule = PRESETS[setup.preset]

    def __call__(self, example: corpus.Example, prompt: list[int], seed: int) -> Reply:
        self._engine.submit(
            GenerationRequest(
                id=str(seed),
                prompt_ids=tuple(prompt),
                max_tokens=MAX_TOKENS,
                sampling=Sampling(seed=seed, temperature=self._temperature),
                schedule=self._schedule,
            )
        )
        ids: list[int] = []
        steps: list[int] = []
        end: Finished | None = None
        while self._engine.has_work:
            for event in self._engine.step():
                if isinstance(event, CanvasDone):
                    ids += event.token_ids
                    steps.append(event.steps)
                elif isinstance(event, Finished):
                    end = event
        if end is None:
            raise RuntimeError("the engine ran out of work without finishing the request")
        if end.stop_id is not None:
            ids.append(end.stop_id)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return Reply(
            family=example.family,
            question=str(example.messages[-1].get("content")),
            text=text,
            right=end.reason == "stop" and example.right(text),
            steps=tuple(steps),
            redrawn=end.usage.redrawn_canvases,
            given_up=end.error is not None,
            tokens=end.usage.completion_tokens,
        )


class TransformersAnswerer:
    """Answers through `transformers`' own generate. Its steps are not reported by it."""

    def __init__(self, setup: Setup) -> None:
        if setup.temperature != 1 or setup.quantize is not None or setup.preset != "balanced":
            raise ValueError("transformers has no temperature or preset for this model and does not quantise it")
        from transformers import DiffusionGemmaForBlockDiffusion

        self._model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(setup.checkpoint, dtype=torch.float32)
        self._model.to(setup.device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(setup.checkpoint)
        self._eos = set(self._model.generation_config.eos_token_id)

    def __call__(self, example: corpus.Example, prompt: list[int], seed: int) -> Reply:
        torch.manual_seed(seed)
        inputs = torch.tensor([prompt], device=self._model.device)
        out = self._model.generate(inputs, max_new_tokens=MAX_TOKENS)
        row: list[int] = getattr(out, "sequences", out)[0, len(prompt) :].tolist()
        end = next((place for place, token in enumerate(row) if token in self._eos), len(row) - 1)
        text = self._tokenizer.decode(row[: end + 1], skip_special_tokens=False)
        question = str(example.messages[-1].get("content"))
        return Reply(example.family, question, text, example.right(text), (), 0, False, end + 1)


ENGINES: dict[str, Callable[[Setup], Answerer]] = {
    "easel": EngineAnswerer,
    "transformers": TransformersAnswerer,
}


def evaluate(setup: Setup, per_family: int, *, families: Sequence[str] = corpus.FAMILIES, processes: int = 1) -> Report:
    """Answer `per_family` held-out prompts of each family and judge them; several `processes` have one thread each."""
    began = time.monotonic()
    items = [(family, index) for index in range(per_family) for family in families]
    shares = [items[start::processes] for start in range(processes)]
    work = partial(_answer, setup, 1 if processes > 1 else 0)
    if processes == 1:
        replies = work(items)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            replies = [reply for share in pool.map(work, shares) for reply in share]
    return _report(replies, families, time.monotonic() - began)


def _answer(setup: Setup, threads: int, items: Iterable[tuple[str, int]]) -> list[Reply]:
    if threads:
        torch.set_num_threads(threads)
    answer = ENGINES[setup.engine](setup)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(setup.checkpoint)
    replies = []
    for family, index in items:
        example = corpus.example("test", index, seed=EVALUATION_SEED, family=family)
        prompt, _ = row_of(example, tokenizer)
        replies.append(answer(example, prompt, index))
    return replies


def _report(replies: Sequence[Reply], families: Sequence[str], seconds: float) -> Report:
    groups = {family: [reply for reply in replies if reply.family == family] for family in families}
    canvases = sum(len(reply.steps) + reply.given_up for reply in replies)
    limited = sum(reply.redrawn for reply in replies)
    steps = sum(sum(reply.steps) for reply in replies)
    return Report(
        prompts=len(replies),
        right={family: round(_mean([reply.right for reply in group]), 4) for family, group in groups.items()},
        steps={
            family: round(_mean([step for reply in group for step in reply.steps]), 2)
            for family, group in groups.items()
        },
        at_limit=round(limited / canvases, 4) if canvases else 0.0,
        tokens_per_step=round(sum(reply.tokens for reply in replies) / steps, 2) if steps else 0.0,
        seconds=round(seconds, 1),
        wrong=[reply for reply in replies if not reply.right],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _table(report: Report) -> str:
    lines = ["family        right   steps a canvas"]
    lines += [
        f"{family:12} {100 * share:5.1f} %   {report.steps[family] or '-'}" for family, share in report.right.items()
    ]
    lines.append(
        f"{report.prompts} prompts in {report.seconds} s; {100 * report.at_limit:.2f} % of canvases at the step limit; "
        f"{report.tokens_per_step} tokens a step"
    )
    overall = _mean(list(report.right.values()))  # as many prompts of each family
    steps = _mean([mean for mean in report.steps.values() if mean])
    lines.append(f"{'all':12} {100 * overall:5.2f} %   {steps:.2f}")
    return "\n".join(lines)


def _line(report: Report) -> str:
    facts = {"right": report.right, "steps": report.steps, "at_limit": report.at_limit, "seconds": report.seconds}
    return json.dumps(facts)


def main() -> None:
    """Parse the command line, evaluate, print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, default=HERE)
    p.add_argument("--prompts", type=int, default=1200)
    p.add_argument("--families", default=",".join(corpus.FAMILIES), help="comma-separated")
    p.add_argument("--temperatures", default="1", help="comma-separated")
    p.add_argument("--presets", default="balanced", help=f"{', '.join(PRESETS)}: comma-separated")
    p.add_argument("--quantize", default="none", help="none, fp8, nvfp4, int4: formats to load it in, comma-separated")
    p.add_argument("--quantize-dense", choices=("fp8",), help="attention and dense MLP too")
    p.add_argument("--engine", choices=tuple(ENGINES), default="easel")
    p.add_argument("--device", default="cpu")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--wrong", type=int, default=0, help="show so many wrong replies")
    p.add_argument("--brief", action="store_true", help="one line of JSON instead of the table")
    p.add_argument("--json", type=Path, help="write the reports here")
    a = p.parse_args()
    families = a.families.split(",")
    if unknown := sorted(set(families) - set(corpus.FAMILIES)):
        p.error(f"unknown families: {', '.join(unknown)}; there are {', '.join(corpus.FAMILIES)}")
    presets = a.presets.split(",")
    if unknown := sorted(set(presets) - set(PRESETS)):
        p.error(f"unknown presets: {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    formats = [None if name == "none" else name for name in a.quantize.split(",")]
    if a.engine != "easel" and formats != [None]:
        p.error("only easel quantises while loading")
    if a.quantize_dense and None in formats:
        p.error("--quantize-dense goes with formats, not with none")
    reports = {}
    for form, preset, temperature in itertools.product(formats, presets, map(float, a.temperatures.split(","))):
        setup = Setup(
            checkpoint=a.checkpoint,
            device=a.device,
            temperature=temperature,
            preset=preset,
            engine=a.engine,
            quantize=form,
            quantize_dense=a.quantize_dense,
        )
        report = evaluate(setup, -(-a.prompts // len(families)), families=families, processes=a.processes)
        named = ", ".join([*([form] if form else []), *([preset] if preset != "balanced" else []), str(temperature)])
        reports[named] = asdict(report)
        title = f"{a.engine}, {form or 'as stored'}, {preset}, temperature {temperature}"
        print(_line(report) if a.brief else f"{title}\n{_table(report)}\n", flush=True)
        for reply in report.wrong[: a.wrong]:
            print(f"{reply.family}: {reply.question!r} -> {reply.text!r}")
    if a.json:
        a.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
