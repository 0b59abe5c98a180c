"""Facts about GPUs that decide tile sizes.

Invariant: a kernel's tile depends on the chip's compute capability and on nothing measured at run time. What start-up
measures (`choosing`) is which of several kernels runs, and all of these are compiled ahead of time.
"""

from __future__ import annotations

from functools import cache

import torch

# Shared memory a program may have, in bytes, by compute capability (CUDA programming guide, table of capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, 121: 101376}

HOPPER = 90  # what is written in Gluon runs there only


@cache
def chip_of(device: torch.device) -> int:
    """Compute capability such as 90; one not in the table counts as the next lower one that is. The interpreter, on a
    CPU, runs what Hopper would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((chip for chip in SHARED_LIMIT if chip <= 10 * major + minor), default=min(SHARED_LIMIT))
