"""What is to be measured, and whether it can be.

Crosses the wall to the server. Knows no torch. Invariant: options that pass `check` ask for nothing that does not
exist; only memory can still be missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.interface import EngineError
from engine.shapes import format_choice, published_generation, shape_of

GROUPS = ("start", "step", "commit", "first-text", "memory", "prefill", "prefix", "beside", "slots")
MOST_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure of a model of random weights, and where. Names as on the command line."""

    shape: str
    formats: tuple[str, ...] = ("bf16",)
    steps: int = 16  # denoise passes of a canvas
    prompts: tuple[int, ...] = (512,)  # tokens committed before the canvas
    slots: tuple[int, ...] = (1, 2, 4, 8)  # canvases open at a time
    only: tuple[str, ...] = GROUPS
    start_up: bool = False  # in processes of their own, with a cold and with a warm kernel cache
    profile: bool = False
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    seed: int = 0


def check(options: BenchOptions) -> None:
    """Raise EngineError for something that cannot be measured."""
    config = shape_of(options.shape).config
    most = published_generation().max_denoising_steps
    longest = config.max_positions - 8 * config.canvas_length  # room for the canvases that are committed behind it
    unknown = [group for group in options.only if group not in GROUPS]
    problems = {
        f"steps must be in 2..{most}, not {options.steps}": not 2 <= options.steps <= most,
        f"a prompt must have 1 to {longest} tokens": not all(1 <= prompt <= longest for prompt in options.prompts),
        f"slots must be in 1..{MOST_SLOTS}": not all(1 <= slots <= MOST_SLOTS for slots in options.slots),
        f"unknown figures {', '.join(unknown)}; choose {', '.join(GROUPS)}": bool(unknown),
        "give at least one format, prompt and number of slots": not (
            options.formats and options.prompts and options.slots
        ),
    }
    for problem, found in problems.items():
        if found:
            raise EngineError(problem)
    for form in options.formats:
        format_choice(form)
