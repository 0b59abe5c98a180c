"""What the demo model is trained on: noisy canvases as the sampler makes them, and the losses over them.

As published recipes for diffusion over canvases have it: positions are replaced by random ids; cross-entropy over every
position of a canvas, clean ones too; causal cross-entropy beside it; self-conditioning from a first pass without
gradient. Ours is what the second pass sees. A canvas replaced at random says nothing about which of its ids were
accepted, so a model trained on those alone does not trust the one choice the sampler has just made, and makes it
again. Most second passes here see the canvas that the sampler would make of the first: the positions it accepts hold
the reply, all others fresh noise.

Knows model and batch; nothing of optimizers. Invariant: fixed shapes and no wait for the device, so that a step can be
captured as a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.demo.dataset import Batch
from engine.demo.training_model import TrainingModel

FULL_NOISE = 0.35  # share of first canvases that are noise throughout, as the sampler's first is
CLEAN_START = 0.25  # share whose beginning is clean, and the rest noise of its own share t
ACCEPTED = 0.8  # share of second canvases that are the sampler's; the others keep the first's noise
DRAWN = 0.3  # share of the sampler's canvases whose sure positions hold what the model drew, right or wrong
SURE = 0.5  # nats: below it, a draw that is not the reply is a mistake and not another choice
FILL_WEIGHT = 0.2  # of a position behind the reply's end
CAUSAL_WEIGHT = 0.3
BALANCE_WEIGHT = 0.01


def losses(model: TrainingModel, batch: Batch, use_soft: bool) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its parts to log, float32 [2]: cross-entropy of the replies and of the causal pass."""
    clean, canvas = batch.clean.long(), batch.canvas.long()
    with torch.no_grad():
        geometry = model.geometry(batch)
        noisy = with_noise(canvas, model.shape.vocab)
        soft = None
        if use_soft:
            _, hidden, _ = model(clean, noisy, geometry, None)
            noisy, soft = after_first_pass(model, hidden, canvas, noisy)
    seen, hidden, balance = model(clean, noisy, geometry, soft)
    position = torch.arange(canvas.shape[-1], device=canvas.device)
    in_reply = position < batch.inside[..., None]
    exists = batch.canvas_owner[..., None] >= 0
    weight = torch.where(in_reply, 1.0, FILL_WEIGHT) * exists
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


def with_noise(canvas: Tensor, vocab: int) -> Tensor:
    """`canvas` [B, N, C] with ids replaced at random: a share t of them, drawn for every canvas, or behind a start."""
    rows, count, length = canvas.shape
    device = canvas.device
    kind = torch.rand(rows, count, 1, device=device)
    t = torch.rand(rows, count, 1, device=device)
    start = (torch.rand(rows, count, 1, device=device) * length).long()
    from_start = kind > 1 - CLEAN_START
    t = torch.where(kind < FULL_NOISE, 1.0, torch.where(from_start, (2 * t).clamp(max=1.0), t))
    replaced = torch.rand(canvas.shape, device=device) < t
    replaced &= ~(from_start & (torch.arange(length, device=device) < start))
    return torch.where(replaced, torch.randint(0, vocab, canvas.shape, device=device), canvas)


def after_first_pass(model: TrainingModel, hidden: Tensor, canvas: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """The canvas of a second pass, int64 [B, N, C], and the soft embeddings it is conditioned on, [B, N * C, M]."""
    rows, count, length = canvas.shape
    device = canvas.device
    temperature = 0.5 + 0.3 * torch.rand(rows, count, 1, 1, device=device)
    logits = model.logits(hidden).view(rows, count, length, -1) / temperature
    soft = model.soft_embedding(logits.flatten(1, 2))
    logs = logits.log_softmax(-1)
    chance = logs.exp()
    entropy = -(chance * logs).sum(-1)  # [B, N, C]
    # The sampler's bound is 0.1. Tighter and wider ones stand for canvases a few steps earlier or later.
    exponent = torch.rand(rows, count, 1, device=device)
    bound = 0.1 * 10 ** torch.where(exponent < 0.4, 0.0, 3.5 * (exponent - 0.4) - 0.7)
    ascending, order = entropy.sort(dim=-1)
    within = ascending.cumsum(-1) - ascending <= bound
    accepted = torch.zeros_like(within).scatter(-1, order, within)
    drawn = (chance / (torch.empty_like(chance).exponential_() + 1e-9)).argmax(-1)
    use_drawn = (torch.rand(rows, count, 1, device=device) < DRAWN) & (entropy < SURE)
    kept = torch.where(use_drawn, drawn, canvas)
    noise = torch.randint(0, model.shape.vocab, canvas.shape, device=device)
    sampled = torch.where(accepted, kept, noise)
    return torch.where(torch.rand(rows, count, 1, device=device) < ACCEPTED, sampled, noisy), soft
