"""What watching costs the engine: the same requests with and without drafts, in turns, timed by denoise step.

    python tests/bench/drafts.py                                      # the demo model
    python tests/bench/drafts.py --shape 26b-a4b --format nvfp4       # random weights of the real sizes, on a GPU

The last line of stdout is one JSON document; `cost` is the share by which a step with drafts is longer (medians).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from engine import (
    CanvasDraft,
    Engine,
    EngineOptions,
    Finished,
    GenerationRequest,
    Sampling,
    Schedule,
    build_engine,
    build_random_engine,
)

DEMO = Path(__file__).parents[2] / "engine" / "demo" / "checkpoint"


def timed(engine: Engine, seed: int, *, drafts: bool) -> tuple[float, int, int]:
    """One canvas of 16 passes (it cannot be done sooner): seconds, passes, drafts seen."""
    schedule = Schedule(max_denoising_steps=16, confidence_threshold=0.0, stability_threshold=256)
    request = GenerationRequest(
        id=f"{seed}-{drafts}",
        prompt_ids=tuple(range(200, 264)),
        max_tokens=engine.info.canvas_length,
        sampling=Sampling(seed=seed),
        schedule=schedule,
        drafts=drafts,
    )
    engine.submit(request)
    began, seen, steps = time.perf_counter(), 0, 0
    while steps == 0:
        for event in engine.step():
            seen += isinstance(event, CanvasDraft)
            if isinstance(event, Finished):
                steps = event.usage.denoise_steps
    seconds = time.perf_counter() - began
    while engine.has_work:  # the end of the reply is committed outside the time taken
        engine.step()
    return seconds, steps, seen


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(DEMO))
    options.add_argument("--shape")
    options.add_argument("--format", default="nvfp4")
    options.add_argument("--rounds", type=int, default=20)
    chosen = options.parse_args()
    settings = EngineOptions(model=chosen.shape or chosen.model, progress=False)
    engine = build_random_engine(chosen.shape, chosen.format, settings) if chosen.shape else build_engine(settings)
    for drafts in (False, True):  # warm-up, not counted
        timed(engine, 0, drafts=drafts)
    step: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(1, chosen.rounds + 1):
        for drafts in (False, True):
            seconds, steps, seen = timed(engine, seed, drafts=drafts)
            assert bool(seen) == drafts
            step[drafts].append(seconds / steps)
    without, watched = median(step[False]), median(step[True])
    print(f"{without * 1000:.3f} ms a step without drafts, {watched * 1000:.3f} ms with them")
    print(json.dumps({"bench": "drafts", "without": without, "with": watched, "cost": watched / without - 1}))


if __name__ == "__main__":
    main()
