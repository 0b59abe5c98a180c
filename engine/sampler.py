"""What decides how a canvas goes on: the temperature of a pass, which positions are kept, when it is done.

Pure functions over tensors, no state. They read the schedule only: a request's temperature shapes nothing
but the draw (`kernels.reference_output`). Scaling the schedule by it instead would wreck text: at 0.1 every position
would be accepted at once, at 2 none.

Invariant: on the same logits the temperature, the acceptance mask and the stop decision are those of transformers.

Shapes: S canvases, C positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.config import GenerationDefaults
from engine.kernels.reference_output import Reading


def temperature_at(step: int, schedule: GenerationDefaults) -> float:
    """The schedule's temperature at denoise pass `step`, 1-based: from t_max down towards t_min.

    Rounded to float32 at every operation, as transformers computes it; the float returned is exactly that value.
    """
    remaining = torch.tensor(schedule.max_denoising_steps - step + 1, dtype=torch.int32)
    share = remaining / schedule.max_denoising_steps
    return float(schedule.t_min + (schedule.t_max - schedule.t_min) * share)


def accept(entropy: Tensor, bound: Tensor) -> Tensor:
    """Positions to keep, bool [S, C]: in ascending entropy [S, C] while the sum of those before stays within `bound`
    (float32 [S], nats).

    The surest position is always kept. Equal entropies are taken from the left.
    """
    ascending, order = torch.sort(entropy, dim=-1, stable=True)
    within = torch.cumsum(ascending, dim=-1) - ascending <= bound[:, None]
    return torch.zeros_like(within).scatter(-1, order, within)


def hold(reading: Reading, pins: Tensor) -> Reading:
    """A reading in which the model is sure of every pinned row. pins int64 [R]: the row's id, -1 = free.

    The probabilities stay as they are: what a pinned row is conditioned on next is its id's own embedding.
    """
    free = pins < 0
    return replace(
        reading,
        best=torch.where(free, reading.best, pins),
        entropy=torch.where(free, reading.entropy, 0.0),
        drawn=torch.where(free, reading.drawn, pins),
    )


@dataclass(frozen=True)
class Verdict:
    """What a pass says about each of S canvases."""

    unchanged: Tensor  # int64 [S]: passes in a row that left the argmax as it was
    done: Tensor  # bool [S]: stable for long enough and sure
    finite: Tensor  # bool [S]


def judge(
    best: Tensor, entropy: Tensor, previous_best: Tensor, unchanged: Tensor, confidence: Tensor, stability: Tensor
) -> Verdict:
    """Compare a pass with the one before.

    best, previous_best int64 [S, C], the latter -1 before the first pass; entropy float32 [S, C]; unchanged int64 [S];
    the thresholds confidence float32 [S], nats, and stability int64 [S], passes.
    """
    mean = entropy.mean(dim=-1)
    same = (best == previous_best).all(dim=-1)
    unchanged = torch.where(same, unchanged + 1, 0)
    finite = mean.isfinite()
    done = finite & (mean < confidence) & (unchanged >= stability)
    return Verdict(unchanged=unchanged, done=done, finite=finite)


@dataclass(frozen=True)
class Penalties:
    """What an id that has occurred costs in each of S canvases, in nats: OpenAI's two penalties."""

    presence: Tensor  # float32 [S]: if it has occurred at all
    frequency: Tensor  # float32 [S]: for each time
    seen: Tensor  # bool [S, V]: occurred in earlier canvases, so that presence is taken off already


def penalise_repeats(logits: Tensor, ids: Tensor, counts: Tensor, penalties: Penalties, softcap: float) -> Tensor:
    """Logits [S, C, V], as the head computes them, less the penalties for what stands before each position.

    ids int64 [S, C]; counts bool [S, C]: the positions that count. Only those to the left of a position count for it,
    so that of several equal ids the first has no reason to leave, and a text that settles stays settled. The penalties
    are nats off the softcapped logits; the result is a copy.
    """
    length = ids.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril(-1) & counts[:, None, :]
    same = ids[:, :, None] == ids[:, None, :]
    times = before.float() @ same.float()  # [S, p, q]: how often ids[q] stands before p
    fresh = ~penalties.seen.gather(1, ids)
    presence = penalties.presence[:, None] * fresh
    cost = penalties.frequency[:, None, None] * times + presence[:, None, :] * (times > 0)
    where = ids[:, None, :].expand(-1, length, -1)
    found = logits.gather(-1, where)
    capped = (found.float() / softcap).tanh() - cost / softcap
    lower = softcap * capped.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    # equal ids get equal values, so it does not matter which of them is written last
    return logits.scatter(-1, where, torch.where(cost == 0, found, lower.to(logits.dtype)))


def counted(ids: Tensor, accepted: Tensor, exempt: Tensor) -> Tensor:
    """The accepted positions that penalties count, bool [S, C]: those before the reply's end.

    ids int64 [S, C], accepted bool [S, C]; exempt int64 [E]: ids that end a reply or fill a canvas behind its end.
    """
    over = accepted & (ids[..., None] == exempt).any(dim=-1)
    return accepted & (over.cumsum(dim=-1) == 0)
