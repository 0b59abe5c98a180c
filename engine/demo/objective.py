"""What the demo model is trained on: noisy canvases as the sampler makes them, and the losses over them.

As published recipes for diffusion over canvases have it: positions are replaced by random ids; cross-entropy over every
position of a canvas, clean ones too; causal cross-entropy beside it; self-conditioning from a first pass without
gradient. Ours is what the second pass sees. A canvas replaced at random says nothing about which of its ids were
accepted, so a model trained on those alone does not trust the one choice the sampler has just made, and makes it
again. Most second passes here see the canvas that the sampler would make of the first: the positions it accepts hold
the reply, all others fresh noise.

Some canvases are gaps: all but a run of positions is held at the reply, as the engine does for infill, decisions and
constrained output. What is held stays clean and is conditioned on itself in the second pass too.

Knows model and batch; nothing of optimizers. Invariant: fixed shapes and no wait for the device, so that a step can be
captured as a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.demo.dataset import EOS, Batch
from engine.demo.training_model import TrainingModel

GAP = 0.15  # share of canvases that are gaps
DOCUMENT_GAP = 0.7  # the same of raw texts, which are there to be filled in
BRIEF = 12  # tokens: replies that are as brief as decisions
BRIEF_GAP = 0.4  # the same of them
FULL_NOISE = 0.4  # share of the other canvases that are noise throughout, as the sampler's first is
CLEAN_START = 0.25  # share whose beginning is clean, and the rest noise of its own share t
SHORT_GAP = 8  # tokens: half of the gaps have at most so many
GAP_AT_START = 0.4  # share of gaps that begin where the canvas begins, as infill has it
GAP_TO_END = 0.2  # share of gaps that reach the end of the canvas, as behind what a grammar has settled
SCATTERED = 0.3  # share of gaps beside which single positions are free, as where several questions are asked
ACCEPTED = 0.8  # share of second canvases that are the sampler's; the others keep the first's noise
DRAWN = 0.1  # share of the sampler's canvases whose sure positions hold what the model drew, right or wrong
SURE = 0.05  # nats: below it, a draw that is not the reply is a mistake and not another choice
FILL_WEIGHT = 0.2  # of a position behind the reply's end, or held
CAUSAL_WEIGHT = 0.3
BALANCE_WEIGHT = 0.01


def losses(model: TrainingModel, batch: Batch, use_soft: bool) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its parts to log, float32 [2]: cross-entropy of the replies and of the causal pass."""
    clean, canvas = batch.clean.long(), batch.canvas.long()
    with torch.no_grad():
        geometry = model.geometry(batch)
        noisy, held = with_noise(canvas, batch.inside, model.shape.vocab)
        soft = None
        if use_soft:
            _, hidden, _ = model(clean, noisy, geometry, None)
            noisy, soft = after_first_pass(model, hidden, canvas, noisy, held)
    seen, hidden, balance = model(clean, noisy, geometry, soft)
    position = torch.arange(canvas.shape[-1], device=canvas.device)
    in_reply = position < batch.inside[..., None]
    exists = batch.canvas_owner[..., None] >= 0
    # the tokens of a short reply weigh more: a decision is one letter, and would be lost among stories
    of_one = (canvas.shape[-1] / batch.inside.clamp(min=1)[..., None]) ** 0.5
    weight = torch.where(in_reply & ~held, of_one, FILL_WEIGHT) * exists
    denoise, of_reply = cross_entropy(hidden, model.embed_tokens.weight, canvas.flatten(1), weight, in_reply & exists)
    known = (batch.owner[:, 1:] == batch.owner[:, :-1]) & (batch.owner[:, 1:] >= 0)
    causal, _ = cross_entropy(seen[:, :-1], model.embed_tokens.weight, clean[:, 1:], known.float(), known)
    total = denoise + CAUSAL_WEIGHT * causal + BALANCE_WEIGHT * balance
    return total, torch.stack((of_reply, causal)).detach()


def cross_entropy(
    hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean over all positions, and the plain mean over those `counted`; hidden [B, T, M], target [B, T]."""
    logits = 30 * torch.tanh(F.linear(hidden, head).float() / 30)
    entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    weight, counted = weight.flatten(), counted.flatten()
    return (entropy * weight).sum() / weight.sum(), (entropy.detach() * counted).sum() / counted.sum()


def with_noise(canvas: Tensor, inside: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """`canvas` [B, N, C] with ids replaced at random, and the positions that are held, bool [B, N, C].

    Replaced are a share t of the ids, drawn for every canvas, everywhere or behind a start; or a gap's, all or a share.
    `inside` [B, N]: tokens of each canvas that belong to the reply.
    """
    rows, count, length = canvas.shape
    device = canvas.device
    position = torch.arange(length, device=device)
    kind = torch.rand(rows, count, 1, device=device)
    t = torch.rand(rows, count, 1, device=device)
    start = (torch.rand(rows, count, 1, device=device) * length).long()
    from_start = kind > 1 - CLEAN_START
    t = torch.where(kind < FULL_NOISE, 1.0, torch.where(from_start, (2 * t).clamp(max=1.0), t))
    replaced = torch.rand(canvas.shape, device=device) < t
    replaced &= ~(from_start & (position < start))
    ends = (canvas == EOS) & (position < inside[..., None])  # a raw text ends with it, a turn does not
    share = torch.where(inside[..., None] <= BRIEF, BRIEF_GAP, GAP)
    share = torch.where(ends.any(-1, keepdim=True), DOCUMENT_GAP, share)
    has_gap = torch.rand(rows, count, 1, device=device) < share
    gap = gaps(inside, length)
    whole = torch.rand(rows, count, 1, device=device) < 0.5
    part = torch.rand(canvas.shape, device=device) < torch.rand(rows, count, 1, device=device)
    replaced = torch.where(has_gap, gap & (whole | part), replaced)
    return torch.where(replaced, torch.randint(0, vocab, canvas.shape, device=device), canvas), has_gap & ~gap


def gaps(inside: Tensor, length: int) -> Tensor:
    """Free positions of canvases of `length` of which `inside` int [B, N] belong to the reply, bool [B, N, length]."""

    def chance() -> Tensor:
        return torch.rand(*inside.shape, 1, device=inside.device)

    position = torch.arange(length, device=inside.device)
    room = inside[..., None].clamp(min=1)
    size = (1 + (chance() * torch.where(chance() < 0.5, SHORT_GAP, room)).long()).minimum(room)
    first = torch.where(chance() < GAP_AT_START, 0, (chance() * (room - size + 1)).long())
    end = torch.where(chance() < GAP_TO_END, length, first + size)
    single = torch.rand(*inside.shape, length, device=inside.device) < 0.5 * chance()
    single &= (chance() < SCATTERED) & (position < room)
    return ((position >= first) & (position < end)) | single


def after_first_pass(
    model: TrainingModel, hidden: Tensor, canvas: Tensor, noisy: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """The canvas of a second pass, int64 [B, N, C], and the soft embeddings it is conditioned on, [B, N * C, M].

    What is `held`, bool [B, N, C], counts as sure, stays, and is conditioned on itself.
    """
    rows, count, length = canvas.shape
    device = canvas.device
    temperature = 0.5 + 0.3 * torch.rand(rows, count, 1, 1, device=device)
    logits = model.logits(hidden).view(rows, count, length, -1) / temperature
    soft = model.soft_embedding(logits.flatten(1, 2))
    own = F.embedding(canvas.flatten(1), model.embed_tokens.weight) * model.shape.hidden**0.5
    soft = torch.where(held.flatten(1)[..., None], own, soft)
    logs = logits.log_softmax(-1)
    chance = logs.exp()
    entropy = torch.where(held, 0.0, -(chance * logs).sum(-1))  # [B, N, C]
    # The sampler's bound is 0.1. Tighter and wider ones stand for canvases a few steps earlier or later.
    exponent = torch.rand(rows, count, 1, device=device)
    bound = 0.1 * 10 ** torch.where(exponent < 0.4, 0.0, 3.5 * (exponent - 0.4) - 0.7)
    ascending, order = entropy.sort(dim=-1)
    within = ascending.cumsum(-1) - ascending <= bound
    accepted = torch.zeros_like(within).scatter(-1, order, within)
    drawn = (chance / (torch.empty_like(chance).exponential_() + 1e-9)).argmax(-1)
    use_drawn = (torch.rand(rows, count, 1, device=device) < DRAWN) & (entropy < SURE)
    kept = torch.where(use_drawn & ~held, drawn, canvas)
    noise = torch.randint(0, model.shape.vocab, canvas.shape, device=device)
    sampled = torch.where(accepted, kept, noise)
    return torch.where(torch.rand(rows, count, 1, device=device) < ACCEPTED, sampled, noisy), soft
