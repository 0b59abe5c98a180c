"""The output side in plain torch: what is read off the logits of a pass, and what goes back in as self-conditioning.

Knows rows of logits and how each row is to be drawn; no canvases, no schedule. Specification like `reference`.

Invariant: a row's results do not depend on the other rows, to the bit. `scaled` below always means float32 logits
[R, V], softcapped, with the bias added, divided by the schedule's temperature; a request's temperature, top_k, top_p
and min_p reach nothing but the draw.

Shapes: R rows, n canvases, M hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How the rows of a pass are to be read."""

    temperature: Tensor  # float32 [R], the schedule's
    request_temperature: Tensor  # float32 [R], multiplies the schedule's for the draw only; 0 = argmax
    top_k: Tensor  # int32 [R]; 0 = off
    top_p: Tensor  # float32 [R]; 1 = off
    min_p: Tensor  # float32 [R]; 0 = off
    uniforms: Tensor  # float32 [R], in [0, 1)
    shaped: bool  # known to the host: some row has a temperature other than 1, a top_k, a top_p or a min_p
    # float32 [n, V], n divides R: row r has bias[r // (R // n)] added to its softcapped logits, for all that is read.
    # Finite, or -inf for an id that must not be: its probability is 0. A row of nothing else has no finite entropy.
    bias: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What one reading of the logits yields for each row."""

    best: Tensor  # int64 [R], argmax of `scaled`, so that a tie that the softcap's rounding makes is one; the lowest id
    entropy: Tensor  # float32 [R], nats; not finite where a logit is not, and the row's other results then say nothing
    drawn: Tensor  # int64 [R]
    probabilities: Tensor  # [R, V] in the logits' dtype


def read_logits(logits: Tensor, softcap: float, draw: Draw) -> Reading:
    """Softcap, bias, temperature, argmax, entropy, a draw and the probabilities of the head's logits [R, V].

    With g the gap of a logit to its row's best, H = sum(p * g) - log(p of the best): one exponential a logit, and a
    sum of terms that are never negative, so nothing cancels.
    """
    scaled = logits.float().div(softcap).tanh_().mul_(softcap)
    if draw.bias is not None:
        scaled.unflatten(0, (draw.bias.shape[0], -1)).add_(draw.bias[:, None])
    scaled.div_(draw.temperature[:, None])
    probabilities = scaled.softmax(dim=-1)
    best = scaled.argmax(dim=-1, keepdim=True)
    gap = scaled.gather(-1, best) - scaled
    if draw.bias is not None:
        gap.clamp_(max=torch.finfo(gap.dtype).max)  # an id that must not be adds 0 times this, not 0 times infinity
    entropy = gap.mul_(probabilities).sum(dim=-1) - probabilities.gather(-1, best)[:, 0].log()
    # the softcap would hide an infinity: this makes the row's NaN
    entropy += logits.sum(dim=-1, dtype=torch.float32).mul_(0)
    return Reading(
        best=best[:, 0],
        entropy=entropy,
        drawn=_draw(scaled, probabilities, best[:, 0], draw),
        probabilities=probabilities.to(logits.dtype),
    )


def log_probabilities(logits: Tensor, softcap: float) -> Tensor:
    """What the model itself finds, at temperature 1: float32 [R, V], nats, of the head's logits [R, V]."""
    return logits.float().div(softcap).tanh_().mul_(softcap).log_softmax(dim=-1)


def soft_embedding(probabilities: Tensor, embedding: Tensor, scale: float) -> Tensor:
    """The expected embedding: probabilities [R, V] @ embedding [V, M] * scale, in the embedding's dtype."""
    return probabilities.to(embedding.dtype) @ embedding * scale


def _draw(scaled: Tensor, probabilities: Tensor, best: Tensor, draw: Draw) -> Tensor:
    """One id per row, int64 [R], by inverse CDF. Rows that leave the draw alone reuse the probabilities."""
    if not draw.shaped:
        return inverse_cdf(probabilities, draw.uniforms)
    greedy = draw.request_temperature == 0
    divisor = torch.where(greedy, 1.0, draw.request_temperature)
    # less the best first: a temperature next to 0 would make infinities of both
    shaped = (scaled - scaled.gather(-1, best[:, None])).div_(divisor[:, None]).softmax(dim=-1)
    shaped = keep_min_p(keep_top_p(keep_top_k(shaped, draw.top_k), draw.top_p), draw.min_p)
    return torch.where(greedy, best, inverse_cdf(shaped, draw.uniforms))


def keep_top_k(probabilities: Tensor, k: Tensor) -> Tensor:
    """Zero all but the k largest of each row [R, V]; k int32 [R], 0 = keep all. Ids tied with the k-th stay.

    Rows need not sum to 1 afterwards.
    """
    vocab = probabilities.shape[-1]
    most = int(k.clamp(max=vocab).max())  # what this waits for is cheap beside a sort
    if most == 0:
        return probabilities
    ranked = probabilities.topk(most, dim=-1).values
    place = k.clamp(max=most) - 1
    least = ranked.gather(-1, place.clamp(min=0).long()[:, None])
    return keep_from(probabilities, torch.where(k[:, None] > 0, least, 0.0))


def keep_top_p(probabilities: Tensor, p: Tensor) -> Tensor:
    """Zero all but the smallest set of each row [R, V] that holds share p of its mass, p float32 [R]; ties stay.

    An id stays if the ids likelier than it hold less than that share. The least probability that stays is found by
    bisection over its bits (non-negative floats sort like their bits): five times cheaper than sorting the rows.
    """
    if bool((p >= 1).all()):
        return probabilities
    enough = p[:, None] * probabilities.sum(dim=-1, keepdim=True)
    high = probabilities.amax(dim=-1, keepdim=True).view(torch.int32)  # the best id always stays, also for p = 0
    low = torch.zeros_like(high)
    likelier = torch.empty_like(probabilities)
    for _ in range(30):  # probabilities are at most 1, whose bits are below 2**30
        middle = (low + high) >> 1
        torch.gt(probabilities, middle.view(torch.float32), out=likelier)
        stays = likelier.mul_(probabilities).sum(dim=-1, keepdim=True) < enough
        low, high = torch.where(stays, low, middle + 1), torch.where(stays, middle, high)
    return keep_from(probabilities, torch.where(p[:, None] < 1, high.view(torch.float32), 0.0))


def keep_min_p(probabilities: Tensor, p: Tensor) -> Tensor:
    """Zero what is less than share p [R] (float32) of the best of its row [R, V]."""
    if bool((p <= 0).all()):
        return probabilities
    return keep_from(probabilities, p[:, None] * probabilities.amax(dim=-1, keepdim=True))


def keep_from(probabilities: Tensor, least: Tensor) -> Tensor:
    """Zero what is below `least` [R, 1] in each row [R, V]. A mask of floats, because `where` is slow on a CPU."""
    mask = torch.empty_like(probabilities)
    torch.ge(probabilities, least, out=mask)
    return mask.mul_(probabilities)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds uniform * total: int64 [R] from weights [R, V], uniforms [R].

    Weights need not be normalised. With a 24-bit uniform below 1 the product stays below the total in float32, so
    an id of weight 0 is never drawn; the clamp covers a parallel scan that is not quite monotonic.
    """
    cumulative = weights.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
