"""Train the demo model on generated chats, further or from nothing.

    python -m engine.demo.train --out DIR --resume engine/demo/checkpoint --minutes 13      # one data-centre GPU
    python -m engine.demo.train --out DIR --minutes 1 --rows 4 --workers 0                  # tries it on a CPU
    python -m engine.demo.train --out DIR --resume A B --minutes 0 --workers 0              # the mean of two runs

Without workers a run has one thread: on a CPU, a run a core from the same weights, with seeds of their own, and the
mean of what they wrote, again and again.

On a GPU the layers are compiled and the whole step (passes, gradients, optimizer, average) is captured as two CUDA
graphs, one with self-conditioning and one without. What fails there is said on a line with "fallback", and training
goes on without it. The weights written are a running average of those trained.

Every line of standard output is a JSON object. Invariant: once its first checkpoint is written, the folder given by
--out holds a whole checkpoint at every moment, whenever the run is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from engine.demo import objective
from engine.demo.dataset import Batch, Chats
from engine.demo.training_model import Shape, TrainingModel, export, restore

HERE = Path(__file__).with_name("checkpoint")
AVERAGE = 0.002  # share of the trained weights that enters the average at each step, unless said otherwise
WITHOUT_SOFT = 0.25  # share of steps whose canvases are the sampler's first: without self-conditioning
LOG_EVERY = 100  # steps


def say(**facts: object) -> None:
    """Print one line of the log."""
    print(json.dumps(facts), flush=True)


class Stepper:
    """One training step over a batch of fixed shape, in place; captured as graphs where `capture` succeeded."""

    def __init__(self, model: TrainingModel, rows: int, lr: float, average: float = AVERAGE) -> None:
        """`average`: share of the trained weights that enters the running average at each step."""
        self.share = average
        self.model, self.device = model, model.embed_tokens.weight.device
        cuda = self.device.type == "cuda"
        self.batch = Batch.empty(rows, model.shape.canvas, self.device)
        self._staged = [torch.empty(self.batch.flat.shape, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self.parameters: list[Tensor] = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(lr, device=self.device),
            betas=(0.9, 0.98),
            eps=1e-9,
            fused=cuda,
            foreach=False,
            capturable=cuda,
        )
        self.facts = torch.zeros(3, device=self.device)  # cross-entropy of replies and of the causal pass, gradient
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def load(self, flat: Tensor) -> None:
        """Bring a batch to the device. The next one is staged while this one's step still runs."""
        if not self._copied:
            self.batch.flat.copy_(flat)
            return
        self._staged.reverse()
        self._copied.reverse()
        self._copied[0].synchronize()
        self._staged[0].copy_(flat)
        self.batch.flat.copy_(self._staged[0], non_blocking=True)
        self._copied[0].record()

    def set_rate(self, rate: float) -> None:
        """The learning rate from now on. A graph reads it from the device."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)

    def run(self, use_soft: bool) -> None:
        """Train on the batch loaded."""
        if use_soft in self._graphs:
            self._graphs[use_soft].replay()
        else:
            self._step(use_soft)

    def _step(self, use_soft: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss, parts = objective.losses(self.model, self.batch, use_soft)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, self.share)
            self.facts.copy_(torch.cat((parts, norm[None])))

    def capture(self) -> None:
        """Capture both kinds of step over the batch loaded; weights and optimizer end as if nothing had run."""
        self.set_rate(0.0)
        before = [p.detach().clone() for p in self.parameters]
        pool = torch.cuda.graph_pool_handle()
        graphs = {}
        try:
            for use_soft in (True, False):
                for _ in range(3):
                    self._step(use_soft)
                self.optimizer.zero_grad(set_to_none=True)
                graphs[use_soft] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[use_soft], pool=pool, stream=torch.cuda.current_stream()):
                    self._step(use_soft)
            self._graphs = graphs
        finally:
            torch.cuda.synchronize()
            self._reset(before)

    @torch.no_grad()
    def _reset(self, weights: list[Tensor]) -> None:
        for kept in (self.parameters, self.average):
            torch._foreach_copy_(kept, weights)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the model hold the average for a while."""
        trained = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            yield
            torch._foreach_copy_(self.parameters, trained)


class Trainer:
    """One run: data, model, clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = o = options
        self._began = time.monotonic()
        # The workers start before anything touches the GPU: a process that has used one must not be copied.
        data = Chats(o.tokenizer, o.rows, Shape().canvas, o.seed)
        prefetch = 8 if o.workers else None
        self.data = iter(DataLoader(data, batch_size=None, num_workers=o.workers, prefetch_factor=prefetch))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(o.seed)
        torch.set_float32_matmul_precision("high")
        if self.device.type == "cuda":
            # One stream for everything: what is captured may not depend on work in another. Not the default one,
            # which cannot be captured. Attention has masks, which only this kernel takes.
            torch.cuda.set_stream(torch.cuda.Stream())
            torch.backends.cuda.enable_cudnn_sdp(False)
        model = TrainingModel(Shape()).to(self.device)
        if o.resume:
            restore(model, *o.resume)
        self.stepper = Stepper(model, o.rows, o.lr, o.average)
        self.step = 0
        self._evaluation: subprocess.Popen[bytes] | None = None

    @property
    def minutes(self) -> float:
        """Minutes since the start, preparations included."""
        return (time.monotonic() - self._began) / 60

    def prepare(self) -> None:
        """On a GPU: compile and capture, as far as that works here."""
        if self.device.type != "cuda":
            return
        self.stepper.load(next(self.data))
        attempts: list[tuple[str, Callable[[], None]]] = []
        if not self.options.no_compile:
            attempts.append(("compile", self._compile))
        if not self.options.no_graphs:
            attempts.append(("graphs", self.stepper.capture))
        for name, attempt in attempts:
            try:
                attempt()
                torch.cuda.synchronize()
                say(prepared=name, minutes=round(self.minutes, 2))
            except Exception as fault:  # whatever a compiler throws: slower training is better than none
                say(fallback=f"training goes on without {name}", why=f"{type(fault).__name__}: {fault}"[:2000])
                if name == "compile":
                    torch.compiler.set_stance("force_eager")

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = 64
        for layer in self.stepper.model.layers:
            layer.compile(dynamic=False)
        objective.cross_entropy = torch.compile(objective.cross_entropy, dynamic=False)
        objective.after_first_pass = torch.compile(objective.after_first_pass, dynamic=False)
        for use_soft in (True, False):
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                loss, _ = objective.losses(self.stepper.model, self.stepper.batch, use_soft)
            loss.backward()
        self.stepper.optimizer.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Train until the time is up, writing the checkpoint now and then."""
        o = self.options
        self.prepare()
        chance = random.Random(o.seed)
        written, asked, asked_at = self.minutes, 0, self.minutes
        while self.minutes < o.minutes:
            self.stepper.load(next(self.data))
            self.stepper.set_rate(o.lr * self._rate())
            self.stepper.run(chance.random() >= WITHOUT_SOFT)
            if self.step % LOG_EVERY == 0:
                speed = (self.step - asked) / max(1e-9, 60 * (self.minutes - asked_at))
                self._log(speed)
                asked, asked_at = self.step, self.minutes
            self.step += 1
            if self.minutes - written >= o.write_every:
                written = self.minutes
                self._write()
        self._log(0.0)
        self._write()
        say(step=self.step, minutes=round(self.minutes, 2), done=True)
        if self._evaluation:
            self._evaluation.wait()

    def _log(self, speed: float) -> None:
        reply, causal, norm = self.stepper.facts.tolist()
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient is {norm} at step {self.step}")
        memory = torch.cuda.max_memory_reserved() / 2**30 if self.device.type == "cuda" else 0.0
        rate = float(self.stepper.optimizer.param_groups[0]["lr"])
        say(
            step=self.step, minutes=round(self.minutes, 2), reply=round(reply, 4), causal=round(causal, 4),
            norm=round(norm, 2), lr=round(rate, 6), steps_per_second=round(speed, 2),
            gib=round(memory, 1),
        )  # fmt: skip

    def _rate(self) -> float:
        """Share of the learning rate: warm-up by steps, then level, then down to nothing by the clock."""
        share = self.minutes / self.options.minutes
        falling: float = min(1.0, (1 - share) / (1 - self.options.decay_from))
        warming: float = min(1.0, (self.step + 1) / self.options.warmup)
        return max(0.0, warming * falling)

    def _write(self) -> None:
        """Put the averaged weights into the folder of `--out`, at no moment half a checkpoint; start an evaluation."""
        if not all(bool(each.isfinite().all()) for each in self.stepper.average):
            raise RuntimeError(f"the weights are not finite at step {self.step}; {self.options.out} holds older ones")
        out = Path(self.options.out)
        new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
        with self.stepper.averaged():
            export(self.stepper.model, new)
        AutoTokenizer.from_pretrained(self.options.tokenizer).save_pretrained(new)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        say(step=self.step, minutes=round(self.minutes, 2), wrote=str(out))
        idle = self._evaluation is None or self._evaluation.poll() is not None
        if self.options.evaluate and idle:
            # In a process of its own, on the CPU: the GPU does not wait for it.
            command = [sys.executable, "-m", "engine.demo.evaluate", "--checkpoint", str(out), "--brief"]
            command += ["--prompts", str(self.options.evaluate), "--processes", str(self.options.evaluators)]
            self._evaluation = subprocess.Popen(command)


def main() -> None:
    """Parse the command line and train."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    p.add_argument("--tokenizer", type=Path, default=HERE)
    p.add_argument(
        "--resume",
        type=Path,
        nargs="+",
        help="checkpoint folder whose weights training starts from; the mean of several",
    )
    p.add_argument("--minutes", type=float, default=13, help="of the whole run, preparations included")
    p.add_argument("--rows", type=int, default=80, help="rows a step, 576 tokens each")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--average", type=float, default=AVERAGE, help="share of a step in the running average written")
    p.add_argument("--warmup", type=int, default=200, help="steps")
    p.add_argument("--decay-from", type=float, default=0.35, help="share of the time after which the rate falls")
    p.add_argument("--workers", type=int, default=8, help="processes that generate examples")
    p.add_argument("--write-every", type=float, default=2.5, help="minutes between checkpoints")
    p.add_argument("--evaluate", type=int, default=0, help="held-out prompts answered at each checkpoint; 0 = none")
    p.add_argument("--evaluators", type=int, default=4, help="processes that answer them")
    p.add_argument("--no-compile", action="store_true", help="on a GPU: do not compile the layers")
    p.add_argument("--no-graphs", action="store_true", help="on a GPU: do not capture the step")
    p.add_argument("--seed", type=int, default=0)
    Trainer(p.parse_args()).run()


if __name__ == "__main__":
    main()
