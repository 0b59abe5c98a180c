"""What the denoising loop does with one canvas's logits: pure functions over rows, no state.

`scaled` below always means float32 logits [C, V] divided by the schedule's temperature. Entropy, acceptance and the
stop rule read `scaled` and the checkpoint's settings only; a request's temperature, top_k and top_p reach nothing
but `draw`. Scaling the schedule by a request's temperature instead would wreck text: at 0.1 every position would be
accepted at once, at 2 none.

Invariant: on the same logits the temperature, the acceptance mask and the stop decision are those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import GenerationDefaults
from engine.interface import Sampling


def temperature_at(step: int, schedule: GenerationDefaults) -> float:
    """The schedule's temperature at denoise pass `step`, 1-based: from t_max down towards t_min.

    Rounded to float32 at every operation, as transformers computes it; the float returned is exactly that value.
    """
    remaining = torch.tensor(schedule.max_denoising_steps - step + 1, dtype=torch.int32)
    share = remaining / schedule.max_denoising_steps
    return float(schedule.t_min + (schedule.t_max - schedule.t_min) * share)


@dataclass(frozen=True)
class RowStats:
    """What one reading of the logits yields for each position of a canvas."""

    best: Tensor  # int64 [C], argmax
    entropy: Tensor  # float32 [C], nats; not finite where a logit is not
    probabilities: Tensor  # float32 [C, V]


def row_statistics(scaled: Tensor) -> RowStats:
    """Argmax, entropy and probabilities of `scaled`, float32 [C, V].

    With g the gap of a logit to its row's best, H = sum(p * g) - log(p of the best): one exponential a logit, and a
    sum of terms that are never negative, so nothing cancels.
    """
    probabilities = scaled.softmax(dim=-1)
    best = scaled.argmax(dim=-1, keepdim=True)
    gap = scaled.gather(-1, best) - scaled
    entropy = gap.mul_(probabilities).sum(dim=-1) - probabilities.gather(-1, best)[:, 0].log()
    return RowStats(best=best[:, 0], entropy=entropy, probabilities=probabilities)


def accept(entropy: Tensor, bound: float) -> Tensor:
    """Positions to keep, bool [C]: in ascending entropy [C] while the sum of those before stays within `bound`.

    The surest position is always kept. Equal entropies are taken from the left.
    """
    ascending, order = torch.sort(entropy, dim=-1, stable=True)
    within = torch.cumsum(ascending, dim=-1) - ascending <= bound
    return torch.zeros_like(within).scatter(-1, order, within)


def draw(scaled: Tensor, stats: RowStats, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One id per position, int64 [C], by inverse CDF with `uniforms`, float32 [C] in [0, 1).

    A request that leaves the draw alone reuses the probabilities already computed.
    """
    if sampling.temperature == 0:
        return stats.best
    probabilities = stats.probabilities
    if sampling.temperature != 1:
        probabilities = (scaled / sampling.temperature).softmax(dim=-1)
    if 0 < sampling.top_k < scaled.shape[-1]:
        probabilities = keep_top_k(probabilities, sampling.top_k)
    if sampling.top_p < 1:
        probabilities = keep_top_p(probabilities, sampling.top_p)
    return inverse_cdf(probabilities, uniforms)


def keep_top_k(probabilities: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of each row [C, V]; ids tied with the k-th stay. Rows need not sum to 1 afterwards."""
    return keep_from(probabilities, probabilities.topk(k, dim=-1).values[..., -1:])


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Zero all but the smallest set of each row [C, V] that holds share `p` of its mass; ties with its last id stay.

    An id stays if the ids likelier than it hold less than that share. The least probability that stays is found by
    bisection over its bits (non-negative floats sort like their bits): five times cheaper than sorting the rows.
    """
    enough = p * probabilities.sum(dim=-1, keepdim=True)
    high = probabilities.amax(dim=-1, keepdim=True).view(torch.int32)  # the best id always stays, also for p = 0
    low = torch.zeros_like(high)
    likelier = torch.empty_like(probabilities)
    for _ in range(30):  # probabilities are at most 1, whose bits are below 2**30
        middle = (low + high) >> 1
        torch.gt(probabilities, middle.view(torch.float32), out=likelier)
        stays = likelier.mul_(probabilities).sum(dim=-1, keepdim=True) < enough
        low, high = torch.where(stays, low, middle + 1), torch.where(stays, middle, high)
    return keep_from(probabilities, high.view(torch.float32))


def keep_from(probabilities: Tensor, least: Tensor) -> Tensor:
    """Zero what is below `least` [C, 1] in each row [C, V]. A mask of floats, because `where` is slow on a CPU."""
    mask = torch.empty_like(probabilities)
    torch.ge(probabilities, least, out=mask)
    return mask.mul_(probabilities)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds uniform * total: int64 [C] from weights [C, V], uniforms [C].

    Weights need not be normalised. With a 24-bit uniform below 1 the product stays below the total in float32, so
    an id of weight 0 is never drawn; the clamp covers a parallel scan that is not quite monotonic.
    """
    cumulative = weights.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


@dataclass(frozen=True)
class Verdict:
    """What the host has to know after a denoise pass; one transfer from the device."""

    finite: bool
    unchanged: bool  # the argmax is the previous pass's
    confident: bool  # the mean entropy is below the confidence threshold


def judge(stats: RowStats, previous_best: Tensor | None, confidence_threshold: float) -> Verdict:
    """Compare a pass with the one before. `previous_best` is int64 [C], or None after the first pass."""
    mean = stats.entropy.mean()
    same = (
        (stats.best == previous_best).all() if previous_best is not None else torch.zeros_like(mean, dtype=torch.bool)
    )
    finite, unchanged, confident = torch.stack((mean.isfinite(), same, mean < confidence_threshold)).tolist()
    return Verdict(finite=finite, unchanged=unchanged, confident=confident)
