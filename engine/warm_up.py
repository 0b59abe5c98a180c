"""Before the first request: every kind of pass that a usual reply meets, so that no user waits for a compiler.

First the kernels of all kinds are compiled, many at a time, or read from Triton's cache on disk. Then the first pass
of a kind sets up libraries, and the second is captured (`engine.graphs`). Kinds not met here are captured when they
come up. Knows no requests.

Invariant: slots are empty before and after.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.denoise import Denoiser
from engine.interface import Sampling
from engine.kernels.launching import compiling
from engine.kv_cache import KVCache

TWICE = 2
# the model's own draw, and one shaped by what most clients send
SAMPLINGS = (Sampling(seed=0), Sampling(seed=0, temperature=0.7, top_p=0.95))


def warm_up(denoiser: Denoiser, caches: Sequence[KVCache], *, canvas_length: int, chunk: int) -> None:
    """Run passes with one to all slots' canvases, with a canvas to commit beside one, and chunks of a prompt."""
    sizes = sorted({canvas_length, chunk})
    # a pass that is only compiled leaves anything in a slot: the next canvas to be opened there clears it
    with compiling():
        _passes(denoiser, caches, sizes, times=1)
    _passes(denoiser, caches, sizes, times=TWICE)


def _passes(denoiser: Denoiser, caches: Sequence[KVCache], sizes: Sequence[int], *, times: int) -> None:
    """Every kind so many `times`; `sizes` of what is committed."""
    first = caches[:1]
    for sampling in SAMPLINGS:
        for count in range(1, len(caches) + 1):
            canvases = [denoiser.open(slot, sampling, 0, guided=True) for slot in range(count)]
            for _ in range(times):
                denoiser.step(canvases, caches[:count])
    for size in sizes:
        ids = [0] * size
        for alone in (False, True):
            canvases = [] if alone else [denoiser.open(0, SAMPLINGS[0], 0, guided=True)]
            for _ in range(times):
                denoiser.step(canvases, [] if alone else first, [(ids, first[0])])
                first[0].reset()
