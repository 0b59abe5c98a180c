"""Canvases from open to done: the denoising loop of the model, in its order.

    canvas = noise
    repeat: logits = denoise(canvas, soft) / T;  done?;  draw;  accept;  re-noise the rest;  soft = embed(logits)

The state of every slot's canvas lives on the device, always at the same addresses, and a pass updates it there, without
the host: so a whole pass, sampler included, can be one CUDA graph, and the host reads one small tensor a pass. Knows
the model's pass and the sampler; nothing of requests, queues or eos ids. What is committed in the same pass only
passes through.

Positions can be pinned: held at an id as if the model were sure of it. Whoever pins says which; a canvas that is
"guided" is also ended by whoever guides it, who may ask for the likeliest of some ids at a position.

Invariant: only a canvas that converged, or one whose guide ended it, is ever "done". One that runs out of passes is
re-drawn once with other noise and then given up ("unconverged"): committed, such a canvas would ruin everything after
it. Logits that are not finite give it up at once.

Shapes: S slots, n canvases of a pass, C canvas, P passes, M hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Protocol

import torch
from torch import Tensor

from engine import sampler
from engine.bias import Bias
from engine.canvas import Canvas, Flags, resolve
from engine.config import GenerationDefaults
from engine.graphs import Graphs
from engine.interface import MAX_DENOISING_STEPS, Sampling, Schedule, TokenLogprobs
from engine.kernels.reference_output import Draw, Reading
from engine.kv_cache import KVCache
from engine.logprobs import logprobs_of, token_logprobs
from engine.plan import PassPlan
from engine.rng import canvas_noise

ATTEMPTS = 2  # the first draw and one re-draw


class Model(Protocol):
    """What the loop needs of the model."""

    def plan(
        self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[tuple[int, KVCache]]
    ) -> PassPlan: ...

    def forward(self, plan: PassPlan, canvas: Tensor | None, soft: Tensor | None) -> Tensor | None: ...

    def read(self, logits: Tensor, draw: Draw) -> Reading: ...

    def embed_soft(self, probabilities: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...

    @property
    def softcap(self) -> float: ...


class Denoiser:
    """Opens canvases and moves them on, one denoise pass at a time."""

    def __init__(
        self,
        model: Model,
        schedule: GenerationDefaults,
        *,
        slots: int,
        canvas_length: int,
        vocab_size: int,
        device: torch.device,
        graphs: bool = False,
    ) -> None:
        """`graphs`: capture passes as CUDA graphs; the model must then do without the host, and its plans come in few
        layouts."""
        self._model = model
        self._graphs = Graphs(device, enabled=graphs)
        self._schedule = schedule
        self._canvas_length = canvas_length
        self._vocab_size = vocab_size
        self._device = device
        self._tables: dict[int, Tensor] = {}  # of temperatures, by the number of passes
        passes = max(schedule.max_denoising_steps, MAX_DENOISING_STEPS)
        shape = (slots, canvas_length)

        def state(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self._ids = state(*shape)  # input of the next pass
        # What the host may ask after a pass lies together, 64 bits each, so that one copy brings it all.
        self._seen = state(slots, 4, canvas_length)
        self._best = self._seen[:, 0]  # argmax of the last pass; -1 before the first
        self._entropy = self._seen.view(torch.float32)[:, 1, :canvas_length]  # of the last pass
        self._kept = self._seen.view(torch.bool)[:, 2, :canvas_length]  # accepted in the last pass
        self._finished = self._seen[:, 3, :2]  # whether the canvas is done; whether what was found is finite
        # the host's copy, from the end of the last pass; and slots that have changed since
        self._told = torch.zeros(self._seen.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._verdicts = self._told.numpy()[:, 3, :2]  # `_finished` there: numpy takes a tenth of torch's time to look
        self._changed: set[int] = set()
        self._pins = state(*shape) - 1  # the id a position is held at; -1 = free
        self._passes, self._unchanged = state(slots), state(slots)
        self._temperatures = state(slots, passes, dtype=torch.float32)  # by pass
        self._entropy_bound, self._confidence = (state(slots, dtype=torch.float32) for _ in range(2))
        self._stability = state(slots)
        self._noise_ids = state(slots, passes + 1, canvas_length)
        self._uniforms = state(slots, passes + 1, canvas_length, dtype=torch.float32)
        self._request_temperature, self._top_p, self._min_p = (state(slots, dtype=torch.float32) for _ in range(3))
        self._top_k = state(slots, dtype=torch.int32)
        self._bias = Bias(slots, vocab_size, schedule, device)
        # made by the first pass, which knows size and dtype, and never again
        self._soft: Tensor | None = None  # [S, C, M], the expected embedding under the last pass; 0 before the first
        self._outputs: dict[Hashable, Tensor] = {}  # logits [n, C, V] by kind of pass; overwritten by the next pass
        self._logits: Tensor | None = None  # those of the last pass
        self._rows: dict[int, int] = {}  # which of them are a slot's
        self._last: tuple[PassPlan, tuple[Canvas, ...]] | None = None  # the last pass's plan, if it committed nothing

    def open(
        self,
        slot: int,
        sampling: Sampling,
        index: int,
        *,
        schedule: Schedule | None = None,
        logprobs: int | None = None,
        said: Sequence[int] = (),
        guided: bool = False,
    ) -> Canvas:
        """A fresh canvas of noise in a slot: number `index` of its reply. `said`: the ids of it so far."""
        chosen = resolve(schedule or Schedule(), self._schedule)
        canvas = Canvas(slot=slot, index=index, sampling=sampling, schedule=chosen, logprobs=logprobs, guided=guided)
        self._pins[slot] = -1
        self._temperatures[slot, : chosen.max_denoising_steps] = self._table(chosen.max_denoising_steps)
        self._entropy_bound[slot] = chosen.entropy_bound
        self._confidence[slot] = chosen.confidence_threshold
        self._stability[slot] = chosen.stability_threshold
        if canvas.biased:
            self._bias.set(slot, sampling, said)
        else:
            self._bias.clear(slot)
        self._request_temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._top_k[slot] = min(sampling.top_k, self._vocab_size)
        self._start(canvas)
        return canvas

    def step(
        self,
        canvases: Sequence[Canvas],
        caches: Sequence[KVCache],
        commits: Sequence[tuple[Sequence[int], KVCache]] = (),
    ) -> None:
        """One pass over all `canvases` (open ones), each on its own prefix in `caches`; `commits` (ids) share the pass.

        A slot may have a canvas here and a chunk among the commits, which then belongs to its prefix. Raises
        ValueError, with nothing changed, if ids do not fit a slot's capacity.
        """
        slots = [canvas.slot for canvas in canvases]
        plan = self._plan(canvases, caches, commits)
        flags = Flags.of(canvases)
        kind = (plan.layout, flags)
        if plan.images:  # too seldom to be captured: a graph would have to know which rows they stand in
            self._pass(plan, flags)
        else:
            self._graphs.run(kind, lambda: self._pass(plan, flags))
        finished = self._wait(slots) if canvases else []
        plan.advance()
        self._logits, self._rows = self._outputs.get(kind), {slot: row for row, slot in enumerate(slots)}
        for canvas, (done, finite) in zip(canvases, finished, strict=True):
            self._advance(canvas, done=done, finite=finite)

    def _wait(self, slots: list[int]) -> list[list[bool]]:
        """Have the host's copy made, all that the host waits for; returns the slots' `_finished`."""
        self._told.copy_(self._seen)
        self._changed.clear()
        return [[bool(each) for each in self._verdicts[slot]] for slot in slots]

    def _plan(
        self,
        canvases: Sequence[Canvas],
        caches: Sequence[KVCache],
        commits: Sequence[tuple[Sequence[int], KVCache]],
    ) -> PassPlan:
        """The plan of a pass; that of the last one if the same canvases go on and nothing is committed: while a canvas
        is open its prefix stays what it was."""
        if self._last is not None and not commits:
            plan, seen = self._last
            if len(seen) == len(canvases) and all(one is other for one, other in zip(seen, canvases, strict=True)):
                return plan
        plan = self._model.plan(commits, [(canvas.slot, cache) for canvas, cache in zip(canvases, caches, strict=True)])
        self._last = None if commits else (plan, tuple(canvases))
        return plan

    def pin(self, canvas: Canvas, start: int, token_ids: Sequence[int]) -> None:
        """Hold the positions from `start` on at `token_ids`, from now on and in every redraw."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        where = (canvas.slot, slice(start, start + len(ids)))
        self._pins[where] = self._ids[where] = ids
        canvas.pinned = True
        if canvas.passes == 0:  # nothing has been found yet
            return
        self._best[where] = ids
        self._entropy[where] = 0
        self._changed.add(canvas.slot)
        if self._soft is not None:
            self._soft[where] = self._model.embed(ids)

    def move(self, canvas: Canvas, target: int, sources: Sequence[int]) -> None:
        """Let what stands at `sources` stand from `target` on instead, to the end; behind them is noise again."""
        slot = canvas.slot
        room = self._canvas_length - target
        come_from = torch.tensor([*sources, *[-1] * room][:room], device=self._device)
        known = come_from >= 0
        come_from.clamp_(min=0)
        noise = self._noise_ids[slot, canvas.passes, target:]
        self._ids[slot, target:] = torch.where(known, self._ids[slot, come_from], noise)
        self._best[slot, target:] = torch.where(known, self._best[slot, come_from], -1)
        self._changed.add(slot)
        if self._soft is not None:
            self._soft[slot, target:] = self._soft[slot, come_from] * known[:, None]

    @property
    def canvas_length(self) -> int:
        """Positions of a canvas."""
        return self._canvas_length

    @property
    def pad_id(self) -> int:
        """The id that fills a canvas behind the end of a reply."""
        return self._schedule.pad_id

    def renoise(self, canvas: Canvas, position: int, avoid: Collection[int]) -> None:
        """Begin a position of a new canvas with the first of its noise that is none of `avoid`."""
        column = self._noise_ids[canvas.slot, : canvas.schedule.max_denoising_steps + 1, position].tolist()
        others = (token_id for token_id in range(self._vocab_size) if token_id not in avoid)
        noise = next((token_id for token_id in column if token_id not in avoid), None)
        self._ids[canvas.slot, position] = next(others) if noise is None else noise

    def found(self, canvas: Canvas) -> tuple[list[int], list[float]]:
        """The argmax and the entropy in nats of every position after the last pass; pins count as found, and sure."""
        return self.accepted(canvas)[:2]

    def accepted(self, canvas: Canvas) -> tuple[list[int], list[float], list[int]]:
        """What `found` tells, and the positions that the last pass accepted."""
        slot = canvas.slot
        best, entropy, kept, _ = self._seen[slot].cpu() if slot in self._changed else self._told[slot]
        length = self._canvas_length
        where = compress(range(length), kept.view(torch.bool)[:length].tolist())
        return best.tolist(), entropy.view(torch.float32)[:length].tolist(), list(where)

    def best_allowed(self, canvas: Canvas, position: int, allowed: bytes) -> int:
        """The likeliest id of the last pass at a position of a guided canvas, among those whose bit is set.

        `allowed`: bit i of 32-bit words in the machine's order, one for each id; at least one is set.
        """
        assert self._logits is not None, "there was a pass with a guided canvas"
        row = self._logits[self._rows[canvas.slot], position].float()
        if canvas.biased:
            cap = self._model.softcap
            row = row.div(cap).tanh().mul(cap) + self._bias.rows(torch.tensor([canvas.slot], device=self._device))[0]
        words = torch.frombuffer(bytearray(allowed), dtype=torch.int32).to(self._device)
        ids = torch.arange(self._vocab_size, device=self._device)
        banned = (words[ids >> 5] >> (ids & 31)) & 1 == 0
        row.clamp_(min=torch.finfo(row.dtype).min)  # a request may ban what the constraint demands: that wins
        return int(row.masked_fill(banned, -torch.inf).argmax())

    def logprobs(self, canvas: Canvas) -> tuple[TokenLogprobs, ...]:
        """How likely the last pass found the ids of a canvas that asked and is done, and the likeliest, C entries."""
        if canvas.steps == 0:  # pinned whole without one
            return (TokenLogprobs(0.0, ()),) * len(canvas.result)
        assert self._logits is not None and canvas.logprobs is not None, "there was a pass, and the canvas asked"
        return token_logprobs(
            self._logits[self._rows[canvas.slot]], canvas.result, canvas.logprobs, self._model.softcap
        )

    def logprobs_of(self, canvas: Canvas, places: Sequence[tuple[int, Sequence[int]]]) -> tuple[tuple[float, ...], ...]:
        """The same of any ids at some positions of the canvas: (position, ids)."""
        assert self._logits is not None, "there was a pass"
        logits = self._logits[self._rows[canvas.slot]]
        return tuple(logprobs_of(logits[position], ids, self._model.softcap) for position, ids in places)

    def passes_left(self, canvas: Canvas) -> int:
        """How many passes the schedule has left for this attempt."""
        return canvas.schedule.max_denoising_steps - canvas.passes

    def finish(self, canvas: Canvas) -> None:
        """End a guided canvas: what was found last, pins included, is its result."""
        canvas.state = "done"
        found = torch.where(self._pins[canvas.slot] < 0, self._best[canvas.slot], self._pins[canvas.slot])
        canvas.result = tuple(found.clamp(min=0).tolist())

    def _table(self, steps: int) -> Tensor:
        """The temperature of each pass of a schedule of so many: float32 [steps]."""
        if steps not in self._tables:
            schedule = replace(self._schedule, max_denoising_steps=steps)
            values = [sampler.temperature_at(step, schedule) for step in range(1, steps + 1)]
            self._tables[steps] = torch.tensor(values, device=self._device)
        return self._tables[steps]

    def _pass(self, plan: PassPlan, flags: Flags) -> None:
        """All of a pass that happens on the device: reads the plan and the slots' state, changes that state only."""
        slots = plan.slots
        if not slots.shape[0]:
            self._model.forward(plan, None, None)
            return
        logits = self._model.forward(plan, self._ids[slots], None if self._soft is None else self._soft[slots])
        assert logits is not None, "there were canvases"
        self._outputs[plan.layout, flags] = logits
        draw, pins = self._draw(slots, shaped=flags.shaped), self._pins[slots] if flags.pinned else None
        found = []
        for index, rows in enumerate(logits):  # one after the other: the probabilities of one canvas are 134 MB
            slot = slots[index : index + 1]
            if flags.penalised:
                rows = self._bias.penalise(rows, slot, self._ids[slot], self._kept[slot], self._model.softcap)
            own = _rows_of(draw, index, self._canvas_length)
            reading = self._model.read(rows, replace(own, bias=self._bias.rows(slot)) if flags.biased else own)
            soft = self._model.embed_soft(reading.probabilities)
            if pins is not None:
                reading = sampler.hold(reading, pins[index])
                soft = torch.where(pins[index, :, None] < 0, soft, self._model.embed(pins[index].clamp(min=0)))
            if self._soft is None:
                self._soft = soft.new_zeros(*self._ids.shape, soft.shape[-1])
            self._soft[slot] = soft
            found.append((reading.best, reading.entropy, reading.drawn))
        self._update(slots, *(torch.stack(parts) for parts in zip(*found, strict=True)))

    def _draw(self, slots: Tensor, *, shaped: bool) -> Draw:
        """How the rows [n * C] of the slots' canvases are to be read."""
        passes = self._passes[slots]

        def rows(values: Tensor) -> Tensor:
            return values.repeat_interleave(self._canvas_length)

        return Draw(
            temperature=rows(self._temperatures[slots, passes]),
            request_temperature=rows(self._request_temperature[slots]),
            top_k=rows(self._top_k[slots]),
            top_p=rows(self._top_p[slots]),
            min_p=rows(self._min_p[slots]),
            uniforms=self._uniforms[slots, passes + 1].flatten(),
            shaped=shaped,
        )

    def _update(self, slots: Tensor, best: Tensor, entropy: Tensor, drawn: Tensor) -> None:
        """The state of the slots int [n] after a pass that found best, entropy and drawn [n, C]."""
        passes = self._passes[slots]
        verdict = sampler.judge(
            best, entropy, self._best[slots], self._unchanged[slots], self._confidence[slots], self._stability[slots]
        )
        kept = sampler.accept(entropy, self._entropy_bound[slots])
        self._kept[slots] = kept
        self._ids[slots] = torch.where(kept, drawn, self._noise_ids[slots, passes + 1])
        self._best[slots] = best
        self._entropy[slots] = entropy
        self._unchanged[slots] = verdict.unchanged
        self._passes[slots] = passes + 1
        self._finished[slots] = torch.stack((verdict.done, verdict.finite), dim=1).long()

    def _advance(self, canvas: Canvas, *, done: bool, finite: bool) -> None:
        """The host's side of the same."""
        canvas.passes += 1
        canvas.steps += 1
        canvas.settled = done
        if not finite:
            canvas.state = "non-finite"
        elif canvas.guided:
            return
        elif done:
            canvas.state = "done"
            canvas.result = tuple(self._told[canvas.slot, 0].tolist())
        elif canvas.passes == canvas.schedule.max_denoising_steps:
            if canvas.attempt + 1 == ATTEMPTS:
                canvas.state = "unconverged"
                return
            canvas.attempt += 1
            canvas.passes = 0
            self._bias.relax(canvas.slot)  # penalties within a canvas may be what keeps it from converging
            self._start(canvas)

    def _start(self, canvas: Canvas) -> None:
        """Fill the slot with the noise of the canvas's attempt."""
        slot = canvas.slot
        noise = canvas_noise(
            canvas.sampling.seed,
            canvas=canvas.index,
            attempt=canvas.attempt,
            passes=canvas.schedule.max_denoising_steps,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
            device=self._device,
        )
        rows = slice(canvas.schedule.max_denoising_steps + 1)
        self._noise_ids[slot, rows], self._uniforms[slot, rows] = noise.ids, noise.uniforms
        self._ids[slot] = torch.where(self._pins[slot] < 0, noise.ids[0], self._pins[slot])
        self._best[slot] = -1
        self._changed.add(slot)
        self._passes[slot] = self._unchanged[slot] = 0
        self._kept[slot] = False
        if self._soft is not None:
            self._soft[slot] = 0


def _rows_of(draw: Draw, index: int, length: int) -> Draw:
    """The rows of canvas number `index`."""
    rows = slice(index * length, (index + 1) * length)
    return replace(
        draw,
        temperature=draw.temperature[rows],
        request_temperature=draw.request_temperature[rows],
        top_k=draw.top_k[rows],
        top_p=draw.top_p[rows],
        min_p=draw.min_p[rows],
        uniforms=draw.uniforms[rows],
        bias=None if draw.bias is None else draw.bias[index : index + 1],
    )
