"""Real JSON schemas against models that do not know them: is every reply valid that was not cut by length?

    python tests/bench/schemas.py FILE.jsonl                         # one {"name": ..., "schema": ...} a line
    python tests/bench/schemas.py FILE.jsonl --models random --max-tokens 256 --seeds 0,1,2

Three models: the bundled demo model, one with random weights, and the same with a liking for quotes and closing
brackets, which comes to an end more often. Schemas are refused by name or every reply that ended is parsed and checked
by jsonschema; the last line of stdout is one JSON document. Exit code 1 if a reply was invalid or a schema hung.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import torch

from engine import CanvasDone, Engine, EngineOptions, Finished, GenerationRequest, Sampling, build_engine
from server.errors import ApiError
from server.exchange import ChatTask, Structure
from server.prompt import PromptRenderer
from server.structure import Structures
from tests.engine.small_models import random_model, save, small_config

DEMO = Path("engine/demo/checkpoint")
QUESTION = (
    "Extract all of it as JSON: Mia is 31 years old and lives in Rome, Via Verdi 5. She works as a baker since 2019."
)
HANGS_AFTER = 120.0  # seconds
MODELS = ("demo", "random", "closing")


@dataclass
class Tally:
    """What became of the schemas with one model."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    steps: int = 0
    canvases: int = 0
    slowest: float = 0.0  # seconds of one reply
    slowest_compile: float = 0.0


class Subject:
    """One model, its tokenizer and what its replies can be held to."""

    def __init__(self, engine: Engine, bias: tuple[tuple[int, float], ...]) -> None:
        self.engine = engine
        self.prompts = PromptRenderer.from_folder(DEMO)
        self.structures = Structures(self.prompts, vocab_size=engine.info.vocab_size, eos_ids=engine.info.eos_ids)
        self.bias = bias

    def reply(self, request: GenerationRequest) -> tuple[str, Finished]:
        """The text of one reply and how it ended; cancelled when it takes too long."""
        deadline = time.monotonic() + HANGS_AFTER
        self.engine.submit(request)
        ids: list[int] = []
        while True:
            for event in self.engine.step():
                if isinstance(event, CanvasDone):
                    ids += event.token_ids
                elif isinstance(event, Finished):
                    return self.prompts.decode(ids), event
            if time.monotonic() > deadline:
                self.engine.cancel(request.id)


def judge(subject: Subject, name: str, schema: Any, seed: int, max_tokens: int, tally: Tally) -> None:
    """Try one schema and add what came of it to the tally."""
    task = ChatTask(
        messages=({"role": "user", "content": QUESTION},), structure=Structure("json", schema, "response_format")
    )
    prompt = subject.prompts.render(task.messages)
    began = time.monotonic()
    try:
        constraint = subject.structures.constraint(task, prompt.opens_in)
    except ApiError as error:
        tally.outcomes["refused"] += 1
        tally.refusals[error.message.removeprefix("response_format: ")[:90]] += 1
        return
    tally.slowest_compile = max(tally.slowest_compile, time.monotonic() - began)
    began = time.monotonic()
    text, end = subject.reply(
        GenerationRequest(
            id=name,
            prompt_ids=prompt.ids,
            max_tokens=max_tokens,
            sampling=Sampling(seed=seed, logit_bias=subject.bias),
            constraint=constraint,
        )
    )
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    tally.steps += end.usage.denoise_steps
    tally.canvases += end.usage.canvases
    tally.outcomes[_outcome(schema, text, end, name, tally)] += 1


def _outcome(schema: Any, text: str, end: Finished, name: str, tally: Tally) -> str:
    if end.reason == "length" and end.error is None:
        return "cut"
    if end.reason != "stop":
        tally.faults.append(f"{name}: {end.reason} {end.error}")
        return "hung" if end.reason == "cancelled" else "failed"
    try:
        checker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        fault = next(iter(checker(schema).iter_errors(json.loads(text))), None)
    except ValueError as error:
        tally.faults.append(f"{name}: {error}: {text[:200]}")
        return "invalid"
    if fault is not None:
        tally.faults.append(f"{name}: {fault.message[:200]}")
    return "valid" if fault is None else "invalid"


@contextmanager
def model(kind: str) -> Iterator[Subject]:
    """A model by its name in MODELS."""
    with tempfile.TemporaryDirectory() as folder:
        path = DEMO
        if kind != "demo":
            path = save(
                random_model(small_config(vocab_size=2048, canvas_length=64, max_position_embeddings=4096)),
                Path(folder),
            )
            for file in DEMO.iterdir():
                if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
                    shutil.copy(file, path)
        engine = build_engine(EngineOptions(model=str(path), device="cpu", progress=False))
        prompts = PromptRenderer.from_folder(DEMO)
        likings = {'"': 60.0, "}": 50.0, "]": 50.0, "<turn|>": 70.0} if kind == "closing" else {}
        bias = tuple((prompts.encode_raw(text, begin=False)[0], value) for text, value in likings.items())
        try:
            yield Subject(engine, bias)
        finally:
            engine.close()


def main() -> None:
    """Parse the command line, try everything, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines with a name and a schema each")
    parser.add_argument("--models", default=",".join(MODELS), help="of demo, random, closing")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--seeds", default="0", help="one reply per schema and seed")
    parser.add_argument("--limit", type=int, help="only the first so many schemas")
    options = parser.parse_args()
    try:
        rows = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()][: options.limit]
    except (OSError, ValueError) as error:
        parser.error(f"{options.file}: {error}")
    torch.set_num_threads(1)
    columns = ("valid", "cut", "refused", "invalid", "failed", "hung")
    print(f"{len(rows)} schemas", *columns, "steps/canvas", "slowest reply", "slowest compile", sep="\t")
    tallies = {}
    for kind in options.models.split(","):
        tally = tallies[kind] = Tally()
        with model(kind) as subject:
            for row in rows:
                for seed in map(int, options.seeds.split(",")):
                    judge(subject, row["name"], row["schema"], seed, options.max_tokens, tally)
        per_canvas = tally.steps / max(tally.canvases, 1)
        counts = [tally.outcomes[column] for column in columns]
        print(
            kind,
            *counts,
            f"{per_canvas:.1f}",
            f"{tally.slowest:.1f} s",
            f"{tally.slowest_compile * 1e3:.0f} ms",
            sep="\t",
        )
    for kind, tally in tallies.items():
        for fault in tally.faults:
            print(f"{kind}: {fault}")
    print("\nrefused:")
    for reason, count in next(iter(tallies.values())).refusals.most_common():
        print(f"{count:4}  {reason}")
    print(json.dumps({kind: dict(tally.outcomes) for kind, tally in tallies.items()}))
    sys.exit(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    main()
