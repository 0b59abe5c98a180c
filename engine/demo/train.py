"""Train the demo model from nothing, or further, on generated chats.

    python -m engine.demo.train --out DIR --minutes 15 --compile                     # one data-centre GPU
    python -m engine.demo.train --out DIR --minutes 1 --tiny 4 --short 2 --long 2 --workers 0   # tries it on a CPU

Objective, as published recipes for diffusion over canvases have it: each canvas position is replaced with probability
t by a random id; cross-entropy over every position of the canvas, clean ones too; plus causal cross-entropy on the
clean sequence; self-conditioning on half of the steps, from a first pass without gradient. Ours: 30 % of the canvases
at exactly t = 1 (the sampler's first pass); another 30 % with a clean beginning of random length, because that is what
the sampler makes of a text with choices in it; positions filled up behind the reply weigh 0.2.

Invariant: the folder given by --out always holds a whole checkpoint, of the last evaluation or of the end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from engine.demo.dataset import Batch, Chats
from engine.demo.evaluate import evaluate
from engine.demo.training_model import Shape, TrainingModel, export, restore

HERE = Path(__file__).with_name("checkpoint")
FULL_NOISE = 0.3  # share of canvases that are noise throughout
CLEAN_START = 0.3  # share of canvases whose beginning is clean, and the rest noise of its own share t
FILL_WEIGHT = 0.2  # of a position behind the reply's end
BALANCE_WEIGHT = 0.01
LOG_EVERY = 50  # steps


def losses(model: TrainingModel, batch: Batch, use_soft: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and its parts to log: cross-entropy of the reply's positions and of the causal pass."""
    rows, count, length = batch.canvas.shape
    device = batch.clean.device
    start = batch.prompt[:, None] + torch.arange(count, device=device) * length
    noisy = _with_noise(batch.canvas, model.shape.vocab)
    soft = None
    if use_soft:
        with torch.no_grad():
            _, hidden, _ = model(batch.clean, noisy, start, None)
            temperature = 0.4 + 0.4 * torch.rand(rows, 1, 1, device=device)
            soft = model.soft_embedding(model.logits(hidden) / temperature)
    seen, hidden, balance = model(batch.clean, noisy, start, soft)
    position = torch.arange(count * length, device=device)
    in_reply = position < batch.reply[:, None]
    exists = position // length * length < batch.reply[:, None]  # a canvas behind the reply's last is never opened
    weight = torch.where(in_reply, 1.0, FILL_WEIGHT) * exists
    entropy = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch.canvas.flatten(), reduction="none")
    entropy = entropy.view(rows, -1)
    denoise = (entropy * weight).sum() / weight.sum()
    known = torch.arange(1, seen.shape[1], device=device) < (batch.prompt + batch.reply)[:, None]
    after = F.cross_entropy(model.logits(seen[:, :-1]).flatten(0, 1), batch.clean[:, 1:].flatten(), reduction="none")
    causal = (after.view(rows, -1) * known).sum() / known.sum()
    of_reply = (entropy * in_reply).sum() / in_reply.sum()
    total = denoise + causal + BALANCE_WEIGHT * balance
    return total, {"reply": of_reply.detach(), "causal": causal.detach()}


def _with_noise(canvas: Tensor, vocab: int) -> Tensor:
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


class Trainer:
    """One run: model, optimizer and clock. Time spent evaluating does not count."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.model = TrainingModel(Shape()).to(self.device)
        if options.resume:
            restore(self.model, options.resume)
        if options.compile:
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), eps=1e-9, fused=fused)
        self.step = 0
        self._began = time.monotonic()
        self._evaluated = 0.0

    @property
    def minutes(self) -> float:
        """Minutes trained."""
        return (time.monotonic() - self._began) / 60

    def run(self) -> None:
        """Train until the time is up, evaluating and writing the checkpoint now and then."""
        o = self.options
        data = Chats(o.tokenizer, {"tiny": o.tiny, "short": o.short, "long": o.long}, self.model.shape.canvas, o.seed)
        loader = DataLoader(
            data,
            batch_size=None,
            num_workers=o.workers,
            prefetch_factor=4 if o.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        for batches in loader:
            if self.minutes >= o.minutes:
                break
            self._train_step(batches)
            if self.minutes - self._evaluated >= o.eval_every:
                self._evaluate(o.eval_n)
        self._evaluate(2 * o.eval_n)

    def _train_step(self, batches: dict[str, Batch]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * self._rate()
        use_soft = random.Random(f"{self.options.seed}/{self.step}").random() < 0.5
        log: dict[str, float] = {}
        for kind, batch in batches.items():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, parts = losses(self.model, batch.to(self.device), use_soft)
            (loss / len(batches)).backward()
            if self.step % LOG_EVERY == 0:
                log |= {f"{kind} {name}": round(float(value), 4) for name, value in parts.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % LOG_EVERY == 0:
            if not math.isfinite(float(norm)):
                raise RuntimeError(f"the gradient is {float(norm)} at step {self.step}")
            self._say({"norm": round(float(norm), 2), **log})
        self.step += 1

    def _rate(self) -> float:
        """Share of the learning rate: warm-up by steps, then level, then down to nothing by the clock."""
        share = self.minutes / self.options.minutes
        falling: float = min(1.0, (1 - share) / (1 - self.options.decay_from))
        warming: float = min(1.0, (self.step + 1) / self.options.warmup)
        return max(0.005, warming * falling)

    def _evaluate(self, per_family: int) -> None:
        began = time.monotonic()
        self._evaluated = self.minutes
        self._write()
        if per_family:
            report = evaluate(self.options.out, self.device.type, per_family)
            self._say({"right": report.right, "steps": report.steps, "at limit": report.at_limit})
        self._began += time.monotonic() - began

    def _write(self) -> None:
        """Put the checkpoint into the folder of `--out`, at no moment half of one."""
        out = Path(self.options.out)
        new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
        export(self.model, new)
        AutoTokenizer.from_pretrained(self.options.tokenizer).save_pretrained(new)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)

    def _say(self, facts: dict[str, object]) -> None:
        print(json.dumps({"step": self.step, "minutes": round(self.minutes, 2), **facts}), flush=True)


def main() -> None:
    """Parse the command line and train."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    p.add_argument("--tokenizer", type=Path, default=HERE)
    p.add_argument("--resume", type=Path, help="checkpoint folder whose weights training starts from")
    p.add_argument("--minutes", type=float, default=15)
    p.add_argument("--tiny", type=int, default=320, help="rows a step of at most 80 tokens")
    p.add_argument("--short", type=int, default=192, help="rows a step of at most 224 tokens")
    p.add_argument("--long", type=int, default=160, help="rows a step of several canvases")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=200, help="steps")
    p.add_argument("--decay-from", type=float, default=0.4, help="share of the time after which the rate falls")
    p.add_argument("--workers", type=int, default=13, help="processes that generate examples")
    p.add_argument("--eval-every", type=float, default=5.0, help="minutes")
    p.add_argument("--eval-n", type=int, default=12, help="prompts of each family an evaluation; 0 = none")
    p.add_argument("--compile", action="store_true", help="compile the layers: worth it from three minutes on")
    p.add_argument("--seed", type=int, default=0)
    Trainer(p.parse_args()).run()


if __name__ == "__main__":
    main()
