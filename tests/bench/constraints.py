"""What a constraint costs the host in one step: a canvas of 256 positions, a vocabulary of 262,144 tokens.

    python tests/bench/constraints.py [--rounds 200]

After a pass the argmax canvas is walked (`advance`, `ends`, `rollback`); where it leaves the grammar one mask is made
(`allowed`, `closing`) and what is forced then is found (`forced`). Compared are a canvas that is right, one that breaks
in the middle, and one of noise. The last line of stdout is one JSON document; times are milliseconds.

The vocabulary is the demo model's and made-up words, as many as Gemma's tokenizer has.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from server.automaton import Automaton, GrammarCompiler
from server.json_grammar import json_grammar
from server.prompt import PromptRenderer

DEMO = "engine/demo/checkpoint"
VOCABULARY, CANVAS = 262_144, 256
SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0, "maximum": 150},
                    "city": {"enum": ["Rome", "Paris", "Berlin"]},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
                },
                "required": ["name", "age", "city", "tags"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}


class Words:
    """Renders nothing: this needs a tokenizer only."""

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> str:
        return ""


def large_tokenizer() -> Tokenizer:
    """The demo model's tokenizer with made-up words up to the size of Gemma's vocabulary."""
    document = json.loads(Tokenizer.from_file(f"{DEMO}/tokenizer.json").to_str())
    vocabulary = document["model"]["vocab"]
    parts = [name for name in vocabulary if name.isalpha()]
    rng = random.Random(1)
    while len(vocabulary) < VOCABULARY:
        left, right = rng.choice(parts), rng.choice(parts)
        word = rng.choice(("", "\u2581")) + left + right + rng.choice(("", ",", ".", '"'))
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(document))
    return tokenizer


def canvases(prompts: PromptRenderer) -> dict[str, list[int]]:
    """Argmax canvases of 256 ids: right, broken in the middle, noise."""
    person = {"name": "Mia of the river", "age": 31, "city": "Rome", "tags": ["baker", "singer in a choir"]}
    right = prompts.encode(json.dumps({"people": [person] * 12}))[:CANVAS]
    rng = random.Random(2)
    noise = [rng.randrange(VOCABULARY) for _ in range(CANVAS)]
    middle = CANVAS // 2
    return {"right": right, "broken": [*right[:middle], *noise[:8], *right[middle + 8 :]], "noise": noise}


def step(automaton: Automaton, ids: list[int]) -> None:
    """The host's part of a step that repairs one position, back to where it began."""
    walked = automaton.advance(ids)
    automaton.ends()
    if walked < len(ids):
        mask = automaton.allowed()
        automaton.closing()
        chosen = next(index * 8 + bit for index, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1)
        if chosen not in automaton.ends():
            automaton.advance([chosen])
            automaton.forced()
            walked += 1
    automaton.rollback(walked)


def timed(call: Callable[[], None], rounds: int) -> dict[str, float]:
    """Milliseconds of a call: the first, the median and the 99th percentile of the others."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    first, rest = times[0], sorted(times[1:])
    return {"first": round(first, 3), "median": round(median(rest), 3), "p99": round(rest[int(len(rest) * 0.99)], 3)}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    prompts = PromptRenderer(large_tokenizer(), Words())
    began = time.perf_counter()
    compiler = GrammarCompiler(prompts, vocab_size=VOCABULARY, eos_ids=(1, 106))
    compiler.automaton(json.dumps({"grammars": [json_grammar({"const": 1})]}))  # waits for the vocabulary
    grammar = json.dumps({"grammars": [json_grammar(SCHEMA)]})
    ready = time.perf_counter()
    compiler.automaton(grammar)
    figures: dict[str, Any] = {
        "vocabulary": round((ready - began) * 1e3, 1),
        "compile": round((time.perf_counter() - ready) * 1e3, 2),
    }
    for name, ids in canvases(prompts).items():
        automaton = compiler.automaton(grammar)
        walked = automaton.advance(ids)
        automaton.rollback(walked)
        figures[name] = {"allowed": walked, **timed(lambda a=automaton, i=ids: step(a, i), options.rounds)}
        print(f"{name:8} {walked:4} of {len(ids)} positions allowed  {figures[name]}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
