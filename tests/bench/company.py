"""How many replies of the demo model differ from those of the same seeds alone when several are written at a time.

    python -m tests.bench.company [--device cuda] [--prompts 200] [--slots 8] [--checkpoint DIR]

With the reference ops none may differ (tests hold that). Triton's kernels take other tiles for more rows, which sums in
another order. Needs no server. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from engine.demo import corpus
from engine.demo.dataset import row_of
from engine.demo.evaluate import HERE, MAX_TOKENS
from engine.engine import DiffusionEngine
from engine.interface import CanvasDone, EngineOptions, Finished, GenerationRequest, Sampling


def replies(engine: DiffusionEngine, requests: Sequence[GenerationRequest], together: int) -> dict[str, list[int]]:
    """Each request's ids. So many run at a time; another joins as soon as one has ended."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    waiting, running = list(requests), 0
    while waiting or engine.has_work:
        while waiting and running < together:
            engine.submit(waiting.pop(0))
            running += 1
        for event in engine.step():
            if isinstance(event, CanvasDone):
                found[event.request_id] += event.token_ids
            elif isinstance(event, Finished):
                running -= 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, default=HERE)
    given = parser.parse_args()
    options = EngineOptions(model=str(given.checkpoint), device=given.device, slots=given.slots, progress=False)
    engine = DiffusionEngine.from_options(options)
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    requests = []
    for number in range(given.prompts):
        example = corpus.example("test", number, family=corpus.FAMILIES[number % len(corpus.FAMILIES)])
        prompt, _ = row_of(example, tokenizer)
        requests.append(
            GenerationRequest(
                id=str(number), prompt_ids=tuple(prompt), max_tokens=MAX_TOKENS, sampling=Sampling(seed=number)
            )
        )
    alone = replies(engine, requests, 1)
    beside = replies(engine, requests, given.slots)
    differ = sum(alone[request.id] != beside[request.id] for request in requests)
    tokens = sum(map(len, alone.values()))
    print(f"{differ} of {given.prompts} replies ({tokens} tokens) differ when {given.slots} are written at a time")
    document = {"bench": "company", "kernels": engine.info.kernels, "slots": given.slots, "prompts": given.prompts}
    print(json.dumps(document | {"differ": differ, "tokens": tokens}))


if __name__ == "__main__":
    main()
