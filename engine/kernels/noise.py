"""How an attempt at a canvas begins: its noise and all else of its slot's state, by one kernel.

Philox in torch is a hundred small operations, for each of which a GPU waits longer than the numbers take. Knows slots
and numbers; no requests.

Invariant: the same bits as `reference_canvas`. No number of a canvas, its seed included, makes another kernel: all are
32-bit words that Triton looks at only when it runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels import reference_canvas
from engine.kernels.catalog import KernelCase
from engine.kernels.launching import launch, only_compiling
from engine.kernels.reference_canvas import CanvasStart, CanvasState
from engine.rng import MASK32

WARPS = 4  # two positions of 256 a thread
MOST_INT32 = 2**31 - 1
NUMBERS = ("slot", "seed_low", "seed_high", "canvas", "attempt", "stability", "top_k", "vocab")


@triton.jit(do_not_specialize=NUMBERS)
def noise_kernel(
    ids, pins, seen, counts, floats, top_ks, temperatures, noise_ids, uniforms, table,
    slot, seed_low, seed_high, canvas, attempt, stability, top_k, vocab,
    entropy_bound, confidence, request_temperature, top_p, min_p,
    PASSES: tl.constexpr, LENGTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row of noise, `rng.canvas_noise`; a row's program also copies the temperature of its pass from
    `table` float32 [passes], that of row 0, which belongs to none, fills the slot's other state. PASSES: of the state,
    of which the grid's rows but one are used."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    inside = lanes < LENGTH
    zeros = tl.zeros((LANES,), tl.uint32)
    word0, word1, _, _ = tl.philox_impl(
        lanes.to(tl.uint32),
        zeros + row.to(tl.uint32),
        zeros + canvas.to(tl.uint32),
        zeros + attempt.to(tl.uint32),
        zeros + seed_low.to(tl.uint32),
        zeros + seed_high.to(tl.uint32),
    )
    drawn = tl.umulhi(word0, zeros + vocab.to(tl.uint32)).to(tl.int64)
    place = (slot * (PASSES + 1) + row) * LENGTH + lanes
    tl.store(noise_ids + place, drawn, mask=inside)
    tl.store(uniforms + place, (word1 >> 8).to(tl.float32) * (1 / 16777216), mask=inside)
    if row > 0:
        tl.store(temperatures + slot * PASSES + row - 1, tl.load(table + row - 1))
    else:
        own = slot * LENGTH + lanes
        held = tl.where(attempt == 0, -1, tl.load(pins + own, mask=inside))
        tl.store(pins + own, held, mask=inside)
        tl.store(ids + own, tl.where(held < 0, drawn, held), mask=inside)
        best = seen + slot * 4 * LENGTH + lanes
        tl.store(best, tl.full((LANES,), -1, tl.int64), mask=inside)
        kept = best + 2 * LENGTH
        tl.store(kept, tl.zeros((LANES,), tl.int64), mask=inside)  # and what fills its words up
        count = counts + slot * 3
        tl.store(count, 0)
        tl.store(count + 1, 0)
        tl.store(count + 2, stability)
        number = floats + slot * 5
        tl.store(number, entropy_bound)
        tl.store(number + 1, confidence)
        tl.store(number + 2, request_temperature)
        tl.store(number + 3, top_p)
        tl.store(number + 4, min_p)
        tl.store(top_ks + slot, top_k)


def start_canvas(state: CanvasState, slot: int, start: CanvasStart) -> None:
    """As `reference_canvas.start_canvas`."""
    length = state.ids.shape[1]
    launch(noise_kernel, (len(start.temperatures) + 1,))(
        state.ids, state.pins, state.seen, state.counts, state.floats, state.top_k, state.temperatures,
        state.noise_ids, state.uniforms, start.temperatures,
        slot, _signed(start.seed & MASK32), _signed(start.seed >> 32), start.canvas, start.attempt,
        min(start.stability, MOST_INT32), start.top_k, start.vocab_size,
        float(start.entropy_bound), float(start.confidence), float(start.request_temperature), float(start.top_p),
        float(start.min_p),
        PASSES=state.temperatures.shape[1],
        LENGTH=length,
        LANES=triton.next_power_of_2(length),
        num_warps=WARPS,
    )  # fmt: skip
    if only_compiling():  # torch's own operations in the pass that follows take indices from the state
        reference_canvas.start_canvas(state, slot, start)


def _signed(word: int) -> int:
    """The 32-bit word as an int32: Triton would take one from 2**31 on for another type, and compile another kernel."""
    return word - 2**32 if word > MOST_INT32 else word


def cases() -> list[KernelCase]:
    """For the model's canvases."""
    tensors = {"ids": "i64", "pins": "i64", "seen": "i64", "counts": "i64", "floats": "fp32", "top_ks": "i32"}
    tensors |= {"temperatures": "fp32", "noise_ids": "i64", "uniforms": "fp32", "table": "fp32"}
    floats = ("entropy_bound", "confidence", "request_temperature", "top_p", "min_p")
    return [
        KernelCase(
            name="noise[256]",
            kernel=noise_kernel,
            signature={name: f"*{kind}:16" for name, kind in tensors.items()}
            | dict.fromkeys(NUMBERS, "i32")
            | dict.fromkeys(floats, "fp32"),
            constants={"PASSES": 256, "LENGTH": 256, "LANES": 256},
            num_warps=WARPS,
        )
    ]
