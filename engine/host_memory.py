"""How the C library deals with memory that a pass on a CPU frees.

Knows no model. Invariant: asked of glibc only; another C library is left as it is.
"""

from __future__ import annotations

import ctypes

# parameters of glibc's mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# the most that it takes: a larger piece is mapped, and given back when freed
_MOST_BYTES = 32 * 2**20
# so much at the end of the heap stays with the process
_KEPT_BYTES = 256 * 2**20


def keep_freed_memory() -> None:
    """Keep what a pass frees for the next one, for the whole process.

    By default glibc gives the end of its heap back as soon as it is larger than what was last mapped: then the
    tensors of every pass with several canvases are new to the process, and the kernel clears their pages one by one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
