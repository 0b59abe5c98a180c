"""Train the demo model from nothing on generated chats.

    python -m engine.demo.train --tokenizer engine/demo/checkpoint --out OUT --minutes 17      # one data-centre GPU
    python -m engine.demo.train --tokenizer engine/demo/checkpoint --out OUT --minutes 1 --short 4 --long 2 --workers 0

Objective (what published block-diffusion recipes use): each canvas position is replaced with probability t by a random
id; cross-entropy over every position of the canvas, clean ones too; plus causal cross-entropy on the clean sequence;
self-conditioning on half of the steps, from a first pass without gradient. Ours: 30 % of canvases at exactly t = 1 (the
sampler's first pass), fill positions after the reply weigh 0.2.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer

from engine.demo import corpus
from engine.demo.tokenizer import render
from engine.demo.training_model import Shape, TrainingModel, export, restore

EOS = 1
EOS_IDS = (1, 106, 50)
SHORT, LONG, LONG_CANVASES = 192, 320, 4  # clean lengths of the two kinds of rows; canvases in a long one
Batch = dict[str, Tensor]


def rows_of(example: corpus.Example, tokenizer: object, canvas: int) -> tuple[list[int], list[int]]:
    """Prompt ids and reply ids, the reply filled with eos to whole canvases."""
    encode = tokenizer.encode  # type: ignore[attr-defined]
    return encode(render(example), add_special_tokens=False), encode(example.reply, add_special_tokens=False)


class Chats(IterableDataset[dict[str, Batch]]):
    """Endless batches {"short": ..., "long": ...}; every worker draws its own examples."""

    def __init__(self, folder: str, short: int, long: int, canvas: int, seed: int) -> None:
        self.folder, self.sizes, self.canvas, self.seed = folder, {"short": short, "long": long}, canvas, seed

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker = info.id if info else 0
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        waiting: dict[str, list[tuple[list[int], list[int]]]] = {"short": [], "long": []}
        i = 0
        while True:
            while any(len(waiting[k]) < n for k, n in self.sizes.items()):
                prompt, reply = rows_of(corpus.example("train", f"{worker}.{i}", self.seed), tokenizer, self.canvas)
                i += 1
                total = len(prompt) + len(reply)
                if total <= SHORT and len(reply) <= self.canvas:
                    waiting["short"].append((prompt, reply))
                elif total <= LONG and len(reply) <= self.canvas * LONG_CANVASES:
                    waiting["long"].append((prompt, reply))
            out = {}
            for kind, n in self.sizes.items():
                out[kind] = self._pack(waiting[kind][:n], kind == "long")
                waiting[kind] = waiting[kind][n:][-4 * n :]
            yield out

    def _pack(self, rows: list[tuple[list[int], list[int]]], long: bool) -> Batch:
        c = self.canvas
        length, n = (LONG, LONG_CANVASES) if long else (SHORT, 1)
        clean = torch.zeros(len(rows), length, dtype=torch.long)
        canvas = torch.full((len(rows), n * c), EOS)
        prompt, reply = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)
        for j, (p, r) in enumerate(rows):
            clean[j, : len(p) + len(r)] = torch.tensor(p + r)
            canvas[j, : len(r)] = torch.tensor(r)
            prompt[j], reply[j] = len(p), len(r)
        return {"clean": clean, "canvas": canvas.view(len(rows), n, c), "prompt": prompt, "reply": reply}


def losses(model: TrainingModel, forward: object, b: Batch, use_soft: bool, fill: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch and what to log."""
    s = model.shape
    rows, n, c = b["canvas"].shape
    dev = b["clean"].device
    start = b["prompt"][:, None] + torch.arange(n, device=dev) * c
    t = torch.where(torch.rand(rows, n, device=dev) < 0.3, 1.0, torch.rand(rows, n, device=dev))
    noise = torch.rand(rows, n, c, device=dev) < t[..., None]
    noisy = torch.where(noise, torch.randint(0, s.vocab, (rows, n, c), device=dev), b["canvas"])
    soft = None
    if use_soft:
        with torch.no_grad():
            _, hidden, _ = forward(b["clean"], noisy, start, None)  # type: ignore[operator]
            heat = 0.4 + 0.4 * torch.rand(rows, 1, 1, device=dev)
            soft = model.soft_embedding(model.logits(hidden) / heat)
    seen, hidden, balance = forward(b["clean"], noisy, start, soft)  # type: ignore[operator]
    at = torch.arange(n * c, device=dev)
    left = b["reply"][:, None] - at
    opened = at // c * c < b["reply"][:, None]  # canvases beyond the reply do not exist
    weight = torch.where(left > 0, 1.0, fill) * opened
    ce = F.cross_entropy(model.logits(hidden).flatten(0, 1), b["canvas"].flatten(), reduction="none").view(rows, -1)
    denoise = (ce * weight).sum() / weight.sum()
    total = b["prompt"] + b["reply"]
    known = torch.arange(1, seen.shape[1], device=dev) < total[:, None]
    causal = F.cross_entropy(model.logits(seen[:, :-1]).flatten(0, 1), b["clean"][:, 1:].flatten(), reduction="none")
    causal_loss = (causal.view(rows, -1) * known).sum() / known.sum()
    real = (ce * (left > 0)).sum() / (left > 0).sum()
    return denoise + causal_loss + 0.01 * balance, {"real": real.detach(), "causal": causal_loss.detach()}


@torch.no_grad()
def generate(model: TrainingModel, prompt: Tensor, canvases: int, steps: int = 48) -> tuple[Tensor, Tensor]:
    """The published sampler for a batch of equal-length prompts [B, L]: ids [B, canvases * C] and steps [B, canvases]."""
    s, (b, length) = model.shape, prompt.shape
    dev = prompt.device
    out, taken = prompt, []
    for _ in range(canvases):
        start = torch.full((b, 1), out.shape[1], device=dev)
        canvas = torch.randint(0, s.vocab, (b, 1, s.canvas), device=dev)
        soft, last = None, torch.full((b, s.canvas), -1, device=dev)
        done = torch.zeros(b, dtype=torch.bool, device=dev)
        count = torch.zeros(b, dtype=torch.long, device=dev)
        for cur in range(steps, 0, -1):
            _, hidden, _ = model(out, canvas, start, soft)
            logits = model.logits(hidden) / (0.4 + 0.4 * cur / steps)
            p = logits.softmax(-1)
            entropy = -(p * logits.log_softmax(-1)).sum(-1)
            best = logits.argmax(-1)
            order, index = entropy.sort(-1)
            keep = torch.zeros_like(done[:, None].expand_as(best)).scatter(-1, index, order.cumsum(-1) - order <= 0.1)
            drawn = torch.multinomial(p.flatten(0, 1), 1).view_as(best)
            fresh = torch.randint(0, s.vocab, best.shape, device=dev)
            canvas = torch.where(keep, drawn, fresh)[:, None]
            soft = model.soft_embedding(logits)
            stop = (best == last).all(-1) & (entropy.mean(-1) < 0.005)
            last = torch.where(done[:, None], last, best)
            count += ~done
            done |= stop
            if done.all():
                break
        taken.append(count)
        out = torch.cat((out, last), dim=1)
    return out[:, length:], torch.stack(taken, 1)


def evaluate(model: TrainingModel, tokenizer: object, per_family: int) -> dict[str, object]:
    """Share of right replies, steps per canvas and canvases at the limit, by family, on held-out items."""
    device = next(model.parameters()).device
    groups: dict[tuple[int, int], list[tuple[corpus.Example, list[int]]]] = {}
    for family in corpus.FAMILIES:
        for i in range(per_family):
            e = corpus.example("test", i, seed=5, family=family)
            prompt = tokenizer.encode(render(e), add_special_tokens=False)  # type: ignore[attr-defined]
            groups.setdefault((len(prompt), 4 if family == "story" else 1), []).append((e, prompt))
    right: dict[str, list[bool]] = {f: [] for f in corpus.FAMILIES}
    steps: dict[str, list[int]] = {f: [] for f in corpus.FAMILIES}
    wrong: dict[str, str] = {}
    for (_, canvases), items in groups.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            ids, taken = generate(model, torch.tensor([p for _, p in items], device=device), canvases)
        for (e, _), row, count in zip(items, ids.tolist(), taken.tolist(), strict=True):
            end = next((k for k, x in enumerate(row) if x in EOS_IDS), len(row) - 1)
            text = tokenizer.decode(row[: end + 1], skip_special_tokens=False)  # type: ignore[attr-defined]
            right[e.family].append(e.right(text))
            steps[e.family] += count[: end // model.shape.canvas + 1]
            if not e.right(text):
                wrong[e.family] = f"{e.messages[-1].get('content')!s:.60} -> {text}"
    every = [x for v in steps.values() for x in v]
    return {
        "right": {f: round(sum(v) / len(v), 3) for f, v in right.items()},
        "steps": {f: round(sum(v) / len(v), 1) for f, v in steps.items()},
        "at_limit": round(sum(x == 48 for x in every) / len(every), 4),
        "wrong": wrong,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=17)
    p.add_argument("--short", type=int, default=512, help="short examples a step")
    p.add_argument("--long", type=int, default=160, help="long examples a step")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--fill", type=float, default=0.2)
    p.add_argument("--warmup", type=int, default=200)
    p.add_argument("--decay_from", type=float, default=0.4, help="share of the time after which the rate falls")
    p.add_argument("--workers", type=int, default=13)
    p.add_argument("--eval_every", type=float, default=3.0, help="minutes")
    p.add_argument("--eval_n", type=int, default=40)
    p.add_argument("--resume", type=Path, help="checkpoint folder whose weights training starts from")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    model = TrainingModel(Shape()).to(device)
    if a.resume:
        restore(model, a.resume)
    if a.compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=False)
    groups = [
        {"params": [q for q in model.parameters() if q.ndim >= 2], "weight_decay": 0.05},
        {"params": [q for q in model.parameters() if q.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98), eps=1e-9, fused=device.type == "cuda")
    data = Chats(a.tokenizer, a.short, a.long, model.shape.canvas, a.seed)
    loader = iter(DataLoader(data, batch_size=None, num_workers=a.workers, prefetch_factor=4 if a.workers else None,
                             pin_memory=device.type == "cuda"))  # fmt: skip
    began, paused, evaluated, step, log = time.time(), 0.0, 0.0, 0, {"real": 0.0, "causal": 0.0}
    while True:
        minutes = (time.time() - began - paused) / 60
        share = minutes / a.minutes
        if share >= 1:
            break
        rate = min(1.0, (step + 1) / a.warmup) * (1 if share < a.decay_from else (1 - share) / (1 - a.decay_from))
        for g in optimizer.param_groups:
            g["lr"] = a.lr * max(rate, 0.005)
        batch = next(loader)
        use_soft = random.Random(f"{a.seed}/{step}").random() < 0.5
        sizes = {k: b["canvas"].numel() for k, b in batch.items()}
        for kind, b in batch.items():
            b = {k: v.to(device, non_blocking=True) for k, v in b.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, stats = losses(model, model, b, use_soft, a.fill)
            (loss * (0.5 if len(sizes) == 2 else 1.0)).backward()
            if step % 50 == 0:
                log = {**log, **{f"{kind}_{k}": round(float(v), 4) for k, v in stats.items()}}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            if not math.isfinite(float(norm)):
                raise RuntimeError(f"gradient is {float(norm)} at step {step}")
            print(json.dumps({"step": step, "min": round(minutes, 2), "norm": round(float(norm), 2), **log}), flush=True)
        step += 1
        if minutes - evaluated >= a.eval_every:
            evaluated, stop = minutes, time.time()
            model.eval()
            export(model, a.out)
            with torch.compiler.set_stance("force_eager"):  # every prompt length would be compiled anew
                print(json.dumps({"step": step, "min": round(minutes, 2), **evaluate(model, tokenizer, a.eval_n)}), flush=True)
            model.train()
            paused += time.time() - stop
    model.eval()
    export(model, a.out)
    tokenizer.save_pretrained(a.out)
    with torch.compiler.set_stance("force_eager"):
        print(json.dumps({"done": True, "steps": step, **evaluate(model, tokenizer, 2 * a.eval_n)}), flush=True)


if __name__ == "__main__":
    main()
