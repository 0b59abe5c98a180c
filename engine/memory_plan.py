"""Does it fit? Bytes of weights, KV cache and work space from shapes alone, for every format and card.

Also how the memory for keys and values is dealt out: slots, the longest context, and what stays for prefixes that are
kept. Used before anything is loaded, and by `easel check` for machines that are not there. Knows no torch, no device
and no file. Invariant: what a plan promises is what loading takes: the same `Layout` and `Pools` are allocated later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.config import ModelConfig, VisionConfig
from engine.formats import Choice, Layout, layout
from engine.interface import CheckpointError
from engine.pages import PAGE, pages_of_a_slot

GB = 1e9
# What cards are sold as. Less than that can be used, more is not called so.
CARDS = (12, 16, 24, 32, 48, 96, 128)
DEFAULT_SLOTS = 4
KEPT_POINTS = 64  # points to go on from: two a turn, and what is beyond that many turns old is of little use
LARGE_CARD = 60 * 10**9  # bytes
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
class Pools:
    """How the memory for keys and values is dealt out."""

    slots: int  # requests at a time
    context: int  # positions of one request
    full: int  # pages of the full layers
    sliding: int  # pages of the sliding layers
    bytes: int

    @property
    def pages(self) -> dict[str, int]:
        """By kind of layer."""
        return {"sliding": self.sliding, "full": self.full}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one model in one format needs, in bytes where nothing else is said."""

    format: str
    weights: int
    working: int  # activations and logits of one slot, and on a GPU what CUDA takes
    working_more: int  # for every further slot
    full_page: int  # a page of all full layers
    sliding_page: int  # a page of all sliding layers
    slot_pages: int  # pages of the sliding layers that a slot can hold at a time
    point_pages: int  # pages of the sliding layers that a point needs for others to go on from
    canvas_length: int  # positions that may be written behind the context
    max_context: int  # positions, the checkpoint's limit

    def needed(self, context: int, slots: int = 1) -> int:
        """The least that will do for one context of so many positions and so many slots."""
        kv = slots * self.slot_pages * self.sliding_page + self._pages(context) * self.full_page
        return self.weights + self.work(slots) + kv

    def context(self, memory: int, slots: int | None = None) -> int:
        """The longest context that `memory` bytes hold, a multiple of 1024 unless the checkpoint's limit is reached;
        0 if not even the shortest fits."""
        pools = self.pools(memory, slots=slots)
        return pools.context if pools else 0

    def pools(
        self, memory: int, *, slots: int | None = None, context: int | None = None, kv_bytes: int | None = None
    ) -> Pools | None:
        """How to deal out `memory` bytes, weights included, of which keys and values get `kv_bytes`: exactly that many,
        or if None what is of use. None if that is not enough.

        `slots`: None = 4, or as many as leave half of it to contexts. `context`: None = the longest. What is left over
        keeps prefixes: the full layers' of further contexts, and the sliding layers' of points to go on from.
        """
        least = min(MIN_CONTEXT, self.max_context) if context is None else context
        for count in (slots,) if slots else range(DEFAULT_SLOTS, 0, -1):
            room = memory - self.weights - self.work(count)
            if kv_bytes is not None:
                room = kv_bytes if kv_bytes <= room else 0
            own = count * self.slot_pages * self.sliding_page
            fitting = self._fitting(room - own)
            if fitting >= least and (count == (slots or 1) or 2 * own <= room):
                longest = fitting if fitting == self.max_context else fitting - fitting % 1024
                return self._deal(count, context or longest, room, everything=kv_bytes is not None)
        return None

    def pools_for(self, slots: int, context: int) -> Pools:
        """As much as it takes for every slot to hold a whole context at the same time, and no more."""
        full, sliding = slots * self._pages(context), slots * self.slot_pages
        taken = full * self.full_page + sliding * self.sliding_page
        return Pools(slots=slots, context=context, full=full, sliding=sliding, bytes=taken)

    def work(self, slots: int) -> int:
        """Bytes of activations and logits."""
        return self.working + (slots - 1) * self.working_more

    def _deal(self, slots: int, context: int, room: int, *, everything: bool) -> Pools:
        """Pages for the slots and one context, and of the rest as many as are of use, or all."""
        full, sliding = self._pages(context), slots * self.slot_pages
        rest = room - full * self.full_page - sliding * self.sliding_page
        more_full, more_sliding = (2 * slots - 1) * full, KEPT_POINTS * self.point_pages
        share = rest / max(1, more_full * self.full_page + more_sliding * self.sliding_page)
        if not everything:
            share = min(1.0, share)
        full, sliding = full + int(share * more_full), sliding + int(share * more_sliding)
        taken = full * self.full_page + sliding * self.sliding_page
        return Pools(slots=slots, context=context, full=full, sliding=sliding, bytes=taken)

    def _pages(self, context: int) -> int:
        return -(-(context + self.canvas_length) // PAGE)

    def _fitting(self, room: int) -> int:
        """Positions of the longest context whose full layers' pages fit into `room` bytes."""
        pages = max(0, room) // max(1, self.full_page)
        return min(self.max_context, pages * PAGE - self.canvas_length)


def default_chunk(gpu: bool, memory: int = 0) -> int:
    """Prompt tokens a pass commits. A GPU reads all weights for each chunk, so there it is longer; each slot's memory
    for sliding layers grows with it, so it is longest where a card's `memory`, in bytes, holds any format and more."""
    return (2048 if memory >= LARGE_CARD else 1024) if gpu else 512


def plan_memory(
    config: ModelConfig,
    weights: Layout | int,
    *,
    name: str,
    itemsize: int = 2,
    gpu: bool = True,
    commit_chunk: int | None = None,
) -> MemoryPlan:
    """The plan of one model; `weights`: their layout or bytes; `itemsize` of the dtype it computes in;
    `commit_chunk`: None = what cards with little memory commit at a time."""
    chunk = default_chunk(gpu) if commit_chunk is None else commit_chunk
    page = dict.fromkeys(("sliding", "full"), 0)
    for layer in config.layers:
        page[layer.kind] += PAGE * 2 * layer.kv_heads * layer.head_dim * itemsize
    window, canvas = config.sliding_window, config.canvas_length
    logits = canvas * config.vocab_size
    return MemoryPlan(
        format=name,
        weights=weights if isinstance(weights, int) else weights.weight_bytes(itemsize),
        working=LOGITS_COPIES * logits * 4 + (GPU_BYTES if gpu else 0) + _vision_work(config.vision, itemsize),
        working_more=2 * logits * itemsize,
        full_page=page["full"],
        sliding_page=page["sliding"],
        slot_pages=pages_of_a_slot(capacity=0, window=window, ahead=chunk + canvas)["sliding"],
        point_pages=pages_of_a_slot(capacity=0, window=window, ahead=0)["sliding"],
        canvas_length=canvas,
        max_context=config.max_positions,
    )


def _vision_work(vision: VisionConfig | None, itemsize: int) -> int:
    """Bytes that the vision tower works in: activations of one image's patches, and their attention's scores, which
    not every device does without."""
    if vision is None:
        return 0
    patches = vision.most_tokens * vision.pooling**2
    widths = 8 * vision.hidden_size + 3 * vision.intermediate_size + vision.heads * patches
    return patches * widths * itemsize


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
    slots: int | None = None,
    flags: Mapping[str, str] = FLAGS,
) -> str | None:
    """None if `wanted` fits into `free` bytes; otherwise what is needed, what is free, and what would do.

    `context` and `slots` as asked for, None = as much as fits; `others`: what the checkpoint could be quantised to,
    and by format, the `flags` that ask for it.
    """
    least = min(MIN_CONTEXT, wanted.max_context) if context is None else context
    needed = wanted.needed(least, slots or 1)
    if needed <= free:
        return None
    served, working = slots or 1, wanted.work(slots or 1)
    kv = needed - wanted.weights - working
    parts = [
        f"the model does not fit: as {wanted.format} it needs {needed / GB:.1f} GB "
        f"({wanted.weights / GB:.1f} of weights, {kv / GB:.2f} of KV cache for {served} slot{'s' * (served > 1)} and "
        f"a context of {least}, "
        f"{working / GB:.1f} to work in), and {free / GB:.1f} GB of memory are free on {where}"
    ]
    shorter = wanted.context(free, slots)
    if shorter:
        parts.append(f"a context of up to {shorter} would fit")
    fitting = {flags[plan.format]: length for plan in others if (length := plan.context(free, slots))}
    if fitting:
        told = ", ".join(f"{asked} (context up to {length})" for asked, length in fitting.items())
        parts.append(f"what fits there is {told}")
    elif not shorter:
        parts.append("no format of this checkpoint fits there")
    card = next((size for size in CARDS if needed <= usable(size)), None)
    parts.append(f"this format needs a card of {card} GB" if card else f"this needs more than {CARDS[-1]} GB")
    return "; ".join(parts)
