"""How fast this machine answers: prompts through an engine in this process, timed from outside.

Knows requests, events and the clock; nothing of HTTP or of how the engine works. Speed is wall-clock tokens of
reply per second, prompt and all (design decision 11), with steps, tokens per forward and time to first text
beside it. Invariant: a result that could not be measured is null, never zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from engine import CanvasDone, Engine, EngineError, Finished, GenerationRequest, Sampling, Usage

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max", "Eva", "Sam")
ANIMALS = ("a fox", "an owl", "a bear", "a cat", "a horse", "a frog", "a rabbit", "a duck")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One request. Times are seconds of wall clock since it was submitted."""

    prompt: str
    prompt_tokens: int
    completion_tokens: int
    canvases: int
    denoise_steps: int
    redrawn_canvases: int
    finish_reason: str
    seconds: float
    seconds_to_first_text: float | None

    @property
    def tokens_per_second(self) -> float | None:
        return ratio(self.completion_tokens, self.seconds)


def story_prompts(count: int) -> Iterator[str]:
    """`count` prompts the demo model was made for, all different up to 64."""
    for i in range(count):
        name, animal = NAMES[i % len(NAMES)], ANIMALS[(i + i // len(NAMES)) % len(ANIMALS)]
        yield f"Write a story about {name} and {animal}."


def measure(
    engine: Engine,
    prompt: str,
    prompt_ids: tuple[int, ...],
    *,
    seed: int,
    max_tokens: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Run one request to its end on an idle engine. Raises EngineError when it does not fit or fails."""
    room = engine.info.context_length - len(prompt_ids)
    request = GenerationRequest(
        id=f"bench-{seed}",
        prompt_ids=prompt_ids,
        max_tokens=room if max_tokens is None else min(room, max_tokens),
        sampling=Sampling(seed=seed),
    )
    began = clock()
    first_text: float | None = None
    engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            match event:
                case CanvasDone(token_ids=ids) if ids and first_text is None:
                    first_text = clock() - began
                case Finished(reason="error", error=error):
                    raise EngineError(f"the engine gave up on {prompt!r}: {error}")
                case Finished(reason=reason, usage=usage):
                    return _measured(prompt, usage, reason, clock() - began, first_text)
    raise EngineError(f"the engine stopped without finishing {prompt!r}")


def _measured(prompt: str, usage: Usage, reason: str, seconds: float, first_text: float | None) -> Measured:
    return Measured(
        prompt=prompt,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        canvases=usage.canvases,
        denoise_steps=usage.denoise_steps,
        redrawn_canvases=usage.redrawn_canvases,
        finish_reason=reason,
        seconds=seconds,
        seconds_to_first_text=first_text,
    )


def summary(results: Iterable[Measured]) -> dict[str, float | int | None]:
    """All requests together: totals for speeds and shares, the median for the time to first text."""
    rows = list(results)
    seconds = sum(row.seconds for row in rows)
    tokens = sum(row.completion_tokens for row in rows)
    steps = sum(row.denoise_steps for row in rows)
    canvases = sum(row.canvases for row in rows)
    first = [row.seconds_to_first_text for row in rows if row.seconds_to_first_text is not None]
    per_step = ratio(seconds, steps)
    return {
        "requests": len(rows),
        "completion_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": ratio(tokens, seconds),
        "steps_per_canvas": ratio(steps, canvases),
        "tokens_per_forward": ratio(tokens, steps),
        "seconds_to_first_text": median(first) if first else None,
        "milliseconds_per_step": None if per_step is None else 1000 * per_step,
        "redrawn_canvases": sum(row.redrawn_canvases for row in rows),
    }


def document(engine: Engine, results: Iterable[Measured]) -> dict[str, Any]:
    """Everything measured, as one JSON object: the engine, the summary, every request."""
    rows = list(results)
    info = asdict(engine.info) | {"eos_ids": sorted(engine.info.eos_ids)}
    requests = [asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in rows]
    return {"bench": "engine", "engine": info, "summary": summary(rows), "requests": requests}


def table(results: Iterable[Measured]) -> Table:
    """The same figures for people."""
    rows = list(results)
    total = summary(rows)
    shown = Table(
        title="wall clock, prompt included",
        title_style="dim",
        show_footer=True,
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = {
        "prompt": f"{total['requests']} requests",
        "tokens": str(total["completion_tokens"]),
        "canvases": str(sum(row.canvases for row in rows)),
        "steps/\ncanvas": _shown(total["steps_per_canvas"], 1),
        "tokens/\nforward": _shown(total["tokens_per_forward"], 2),
        "first\ntext s": _shown(total["seconds_to_first_text"], 3),
        "ms/\nstep": _shown(total["milliseconds_per_step"], 1),
        "tokens\n/s": _shown(total["tokens_per_second"], 1),
    }
    shown.add_column("prompt", columns.pop("prompt"), no_wrap=True)
    for name, footer in columns.items():
        shown.add_column(name, footer, justify="right", no_wrap=True)
    for row in rows:
        one = summary([row])
        shown.add_row(
            shorten(row.prompt, width=16, placeholder="…"),
            str(row.completion_tokens),
            str(row.canvases),
            _shown(one["steps_per_canvas"], 1),
            _shown(one["tokens_per_forward"], 2),
            _shown(one["seconds_to_first_text"], 3),
            _shown(one["milliseconds_per_step"], 1),
            _shown(one["tokens_per_second"], 1),
        )
    return shown


def ratio(amount: float, per: float) -> float | None:
    """amount / per, or None where there is nothing to divide by."""
    return amount / per if per else None


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
