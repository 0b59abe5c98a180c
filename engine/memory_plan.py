"""Does it fit? Bytes of weights, KV cache and work space from shapes alone, for every format and card.

Used before anything is loaded, and by `easel check` for machines that are not there. Knows no torch, no device and
no file. Invariant: what a plan promises is what loading takes: the same `Layout` is allocated later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.formats import Choice, Layout, layout
from engine.interface import CheckpointError
from engine.pages import PAGE, pages_of_a_slot

GB = 1e9
# What cards are sold as. Less than that can be used, more is not called so.
CARDS = (12, 16, 24, 32, 48, 96, 128)
MIN_CONTEXT = 1024  # positions; a model that leaves no room for these does not fit
# The CUDA context, its libraries and kernels.
GPU_BYTES = 2**29
# float32 arrays [canvas, vocabulary] alive at once: logits, those of the step before, what sampling makes of them.
LOGITS_COPIES = 6
CHOICES = {
    "bf16": Choice(),
    "fp8": Choice("fp8", "fp8"),
    "nvfp4": Choice("nvfp4"),
    "nvfp4, dense fp8": Choice("nvfp4", "fp8"),
    "int4": Choice("int4"),
    "int4, dense fp8": Choice("int4", "fp8"),
}
FLAGS = {
    "bf16": "no --quantize",
    "fp8": "--quantize fp8",
    "nvfp4": "--quantize nvfp4",
    "nvfp4, dense fp8": "--quantize nvfp4 --quantize-dense fp8",
    "int4": "--quantize int4",
    "int4, dense fp8": "--quantize int4 --quantize-dense fp8",
}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one model in one format needs. All in bytes but `ahead` and `max_context`."""

    format: str
    weights: int
    working: int  # activations and logits, and on a GPU what CUDA takes
    sliding: int  # KV of the sliding layers, which does not grow beyond their window
    per_position: int  # KV of the full layers
    ahead: int  # positions a pass may write behind the context
    max_context: int  # the checkpoint's limit

    def needed(self, context: int) -> int:
        """Bytes for a context of so many positions."""
        pages = -(-(context + self.ahead) // PAGE)
        return self.weights + self.working + self.sliding + pages * PAGE * self.per_position

    def context(self, memory: int) -> int:
        """The longest context that `memory` bytes hold, a multiple of 1024 unless the checkpoint's limit is reached;
        0 if not even the shortest fits."""
        pages = (memory - self.weights - self.working - self.sliding) // (PAGE * self.per_position)
        fitting = pages * PAGE - self.ahead
        if fitting >= self.max_context:
            return self.max_context
        fitting -= fitting % 1024
        return fitting if fitting >= min(MIN_CONTEXT, self.max_context) else 0


def plan_memory(
    config: ModelConfig,
    weights: Layout,
    *,
    name: str,
    itemsize: int = 2,
    gpu: bool = True,
    commit_chunk: int = 512,
) -> MemoryPlan:
    """The plan of one model; `itemsize` of the dtype it computes in, `commit_chunk` as in EngineOptions."""
    per_kind = dict.fromkeys(("sliding", "full"), 0)
    for layer in config.layers:
        per_kind[layer.kind] += 2 * layer.kv_heads * layer.head_dim * itemsize
    ahead = commit_chunk + config.canvas_length
    sliding_pages = pages_of_a_slot(capacity=0, window=config.sliding_window, ahead=ahead)["sliding"]
    logits = LOGITS_COPIES * config.canvas_length * config.vocab_size * 4
    return MemoryPlan(
        format=name,
        weights=weights.weight_bytes(itemsize),
        working=logits + (GPU_BYTES if gpu else 0),
        sliding=sliding_pages * PAGE * per_kind["sliding"],
        per_position=max(1, per_kind["full"]),
        ahead=ahead,
        max_context=config.max_positions,
    )


def plans(config: ModelConfig, *, itemsize: int = 2, gpu: bool = True) -> tuple[MemoryPlan, ...]:
    """One plan for each format that an unquantised checkpoint can be loaded in: groups of columns that share a scale
    must divide its matrices, so a small model may have no plan for some."""
    found = []
    for name, choice in CHOICES.items():
        try:
            weights = layout(config, choice=choice)
        except CheckpointError:
            continue
        found.append(plan_memory(config, weights, name=name, itemsize=itemsize, gpu=gpu))
    return tuple(found)


def usable(card: int) -> int:
    """Bytes of a card sold with so many GB that a program can have: drivers and screens keep the rest."""
    return int(card * GB)


def refusal(
    wanted: MemoryPlan,
    others: Sequence[MemoryPlan],
    *,
    context: int | None,
    free: int,
    where: str,
    flags: Mapping[str, str] = FLAGS,
) -> str | None:
    """None if `wanted` fits into `free` bytes; otherwise what is needed, what is free, and what would do.

    `context` as asked for, None = as much as fits; `others`: what the same checkpoint could be quantised to,
    and by format, the `flags` that ask for it.
    """
    least = min(MIN_CONTEXT, wanted.max_context) if context is None else context
    needed = wanted.needed(least)
    if needed <= free:
        return None
    kv = needed - wanted.weights - wanted.working
    parts = [
        f"the model does not fit: as {wanted.format} it needs {needed / GB:.1f} GB "
        f"({wanted.weights / GB:.1f} of weights, {kv / GB:.2f} of KV cache for a context of {least}, "
        f"{wanted.working / GB:.1f} to work in), and {free / GB:.1f} GB of memory are free on {where}"
    ]
    shorter = wanted.context(free)
    if shorter:
        parts.append(f"a context of up to {shorter} would fit")
    fitting = {flags[plan.format]: plan.context(free) for plan in others if plan.context(free)}
    if fitting:
        told = ", ".join(f"{asked} (context up to {length})" for asked, length in fitting.items())
        parts.append(f"what fits there is {told}")
    elif not shorter:
        parts.append("no format of this checkpoint fits there")
    card = next((size for size in CARDS if needed <= usable(size)), None)
    parts.append(f"this format needs a card of {card} GB" if card else f"this needs more than {CARDS[-1]} GB")
    return "; ".join(parts)
