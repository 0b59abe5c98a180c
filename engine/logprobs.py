"""Log-probabilities for people: read off the logits of a pass that is over, for the few who ask.

Knows logits and ids, no canvases. A few rows at a time, in float32: all rows of a large vocabulary at once would take
half a gigabyte. Invariant: they are the model's own, at temperature 1 and over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.interface import TokenLogprobs
from engine.kernels.reference_output import log_probabilities

ROWS = 32  # at a time


def token_logprobs(logits: Tensor, ids: Sequence[int], top: int, softcap: float) -> tuple[TokenLogprobs, ...]:
    """Of ids [R] in logits [R, V], and of the `top` likeliest at each row."""
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    result: list[TokenLogprobs] = []
    for rows, own in zip(logits.split(ROWS), chosen.split(ROWS), strict=True):
        found = log_probabilities(rows, softcap)
        values, indices = (part.tolist() for part in found.topk(min(top, found.shape[-1]), dim=-1))
        result += (
            TokenLogprobs(each, tuple(zip(which, what, strict=True)))
            for each, which, what in zip(found.gather(-1, own)[:, 0].tolist(), indices, values, strict=True)
        )
    return tuple(result)


def logprobs_of(logits: Tensor, ids: Sequence[int], softcap: float) -> tuple[float, ...]:
    """Of some ids in one row of logits [V]."""
    return tuple(log_probabilities(logits[None], softcap)[0, list(ids)].tolist())
