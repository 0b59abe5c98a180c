"""The output side in plain torch: what is read off the logits of a pass, and what goes back in as self-conditioning.

Knows rows of logits and how each row is to be drawn; no canvases, no schedule. Specification like `reference`.

Invariant: a row's results do not depend on the other rows, to the bit. `scaled` below always means float32 logits
[R, V], softcapped and divided by the schedule's temperature; a request's temperature, top_k and top_p reach nothing but
the draw.

Shapes: R rows, M hidden, V vocabulary.
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
    uniforms: Tensor  # float32 [R], in [0, 1)
    shaped: bool  # known to the host: some row has a temperature other than 1, a top_k or a top_p


@dataclass(frozen=True)
class Reading:
    """What one reading of the logits yields for each row."""

    best: Tensor  # int64 [R], argmax
    entropy: Tensor  # float32 [R], nats; not finite where a logit is not
    drawn: Tensor  # int64 [R]
    probabilities: Tensor  # [R, V] in the logits' dtype


def read_logits(logits: Tensor, softcap: float, draw: Draw) -> Reading:
    """Softcap, temperature, argmax, entropy, a draw and the probabilities of logits [R, V], as the head computes them.

    With g the gap of a logit to its row's best, H = sum(p * g) - log(p of the best): one exponential a logit, and a
    sum of terms that are never negative, so nothing cancels.
    """
    scaled = logits.float().div(softcap).tanh_().mul_(softcap).div_(draw.temperature[:, None])
    probabilities = scaled.softmax(dim=-1)
    best = scaled.argmax(dim=-1, keepdim=True)
    gap = scaled.gather(-1, best) - scaled
    entropy = gap.mul_(probabilities).sum(dim=-1) - probabilities.gather(-1, best)[:, 0].log()
    entropy += logits.float().mul(0).sum(dim=-1)  # the softcap would hide an infinity: this makes the row's NaN
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
    shaped = (scaled / divisor[:, None]).softmax(dim=-1)
    shaped = keep_top_p(keep_top_k(shaped, draw.top_k), draw.top_p)
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
