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
from engine.kernels.reference_canvas import CanvasStart, CanvasState
from engine.kernels.reference_output import Draw, Reading
from engine.kv_cache import KVCache
from engine.logprobs import logprobs_of, token_logprobs
from engine.plan import PassPlan

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

    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None: ...

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
        self._state = CanvasState(slots, canvas_length, passes, device)
        # the host's copy of what it may see, from the end of the last pass; and slots that have changed since
        seen = self._state.seen
        self._told = torch.zeros(seen.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._verdicts = self._told.numpy()[:, 3, :2]  # `finished` there: numpy takes a tenth of torch's time to look
        self._changed: set[int] = set()
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
        if canvas.biased:
            self._bias.set(slot, sampling, said)
        else:
            self._bias.clear(slot)
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
        """Have the host's copy made, all that the host waits for; returns the slots' `finished`."""
        self._told.copy_(self._state.seen)
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
        state = self._state
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        where = (canvas.slot, slice(start, start + len(ids)))
        state.pins[where] = state.ids[where] = ids
        canvas.pinned = True
        if canvas.passes == 0:  # nothing has been found yet
            return
        state.best[where] = ids
        state.entropy[where] = 0
        self._changed.add(canvas.slot)
        if self._soft is not None:
            self._soft[where] = self._model.embed(ids)

    def move(self, canvas: Canvas, target: int, sources: Sequence[int]) -> None:
        """Let what stands at `sources` stand from `target` on instead, to the end; behind them is noise again."""
        state, slot = self._state, canvas.slot
        room = self._canvas_length - target
        come_from = torch.tensor([*sources, *[-1] * room][:room], device=self._device)
        known = come_from >= 0
        come_from.clamp_(min=0)
        noise = state.noise_ids[slot, canvas.passes, target:]
        state.ids[slot, target:] = torch.where(known, state.ids[slot, come_from], noise)
        state.best[slot, target:] = torch.where(known, state.best[slot, come_from], -1)
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
        column = self._state.noise_ids[canvas.slot, : canvas.schedule.max_denoising_steps + 1, position].tolist()
        others = (token_id for token_id in range(self._vocab_size) if token_id not in avoid)
        noise = next((token_id for token_id in column if token_id not in avoid), None)
        self._state.ids[canvas.slot, position] = next(others) if noise is None else noise

    def found(self, canvas: Canvas) -> tuple[list[int], list[float]]:
        """The argmax and the entropy in nats of every position after the last pass; pins count as found, and sure."""
        return self.accepted(canvas)[:2]

    def accepted(self, canvas: Canvas) -> tuple[list[int], list[float], list[int]]:
        """What `found` tells, and the positions that the last pass accepted."""
        slot = canvas.slot
        best, entropy, kept, _ = self._state.seen[slot].cpu() if slot in self._changed else self._told[slot]
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
        pins = self._state.pins[canvas.slot]
        found = torch.where(pins < 0, self._state.best[canvas.slot], pins)
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
        state, slots = self._state, plan.slots
        if not slots.shape[0]:
            self._model.forward(plan, None, None)
            return
        logits = self._model.forward(plan, state.ids[slots], None if self._soft is None else self._soft[slots])
        assert logits is not None, "there were canvases"
        self._outputs[plan.layout, flags] = logits
        draw, pins = self._draw(slots, shaped=flags.shaped), state.pins[slots] if flags.pinned else None
        found = []
        for index, rows in enumerate(logits):  # one after the other: the probabilities of one canvas are 134 MB
            slot = slots[index : index + 1]
            if flags.penalised:
                rows = self._bias.penalise(rows, slot, state.ids[slot], state.kept[slot], self._model.softcap)
            own = _rows_of(draw, index, self._canvas_length)
            reading = self._model.read(rows, replace(own, bias=self._bias.rows(slot)) if flags.biased else own)
            soft = self._model.embed_soft(reading.probabilities)
            if pins is not None:
                reading = sampler.hold(reading, pins[index])
                soft = torch.where(pins[index, :, None] < 0, soft, self._model.embed(pins[index].clamp(min=0)))
            if self._soft is None:
                self._soft = soft.new_zeros(*state.ids.shape, soft.shape[-1])
            self._soft[slot] = soft
            found.append((reading.best, reading.entropy, reading.drawn))
        self._update(slots, *(torch.stack(parts) for parts in zip(*found, strict=True)))

    def _draw(self, slots: Tensor, *, shaped: bool) -> Draw:
        """How the rows [n * C] of the slots' canvases are to be read."""
        state = self._state
        passes = state.passes[slots]

        def rows(values: Tensor) -> Tensor:
            return values.repeat_interleave(self._canvas_length)

        return Draw(
            temperature=rows(state.temperatures[slots, passes]),
            request_temperature=rows(state.request_temperature[slots]),
            top_k=rows(state.top_k[slots]),
            top_p=rows(state.top_p[slots]),
            min_p=rows(state.min_p[slots]),
            uniforms=state.uniforms[slots, passes + 1].flatten(),
            shaped=shaped,
        )

    def _update(self, slots: Tensor, best: Tensor, entropy: Tensor, drawn: Tensor) -> None:
        """The state of the slots int [n] after a pass that found best, entropy and drawn [n, C]."""
        state = self._state
        passes = state.passes[slots]
        verdict = sampler.judge(
            best, entropy, state.best[slots], state.unchanged[slots], state.confidence[slots], state.stability[slots]
        )
        kept = sampler.accept(entropy, state.entropy_bound[slots])
        state.kept[slots] = kept
        state.ids[slots] = torch.where(kept, drawn, state.noise_ids[slots, passes + 1])
        state.best[slots] = best
        state.entropy[slots] = entropy
        state.unchanged[slots] = verdict.unchanged
        state.passes[slots] = passes + 1
        state.finished[slots] = torch.stack((verdict.done, verdict.finite), dim=1).long()

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
        """Fill the slot with the noise of the canvas's attempt and what its request wants."""
        slot, sampling, schedule = canvas.slot, canvas.sampling, canvas.schedule
        start = CanvasStart(
            seed=sampling.seed,
            canvas=canvas.index,
            attempt=canvas.attempt,
            vocab_size=self._vocab_size,
            temperatures=self._table(schedule.max_denoising_steps),
            entropy_bound=schedule.entropy_bound,
            confidence=schedule.confidence_threshold,
            stability=schedule.stability_threshold,
            request_temperature=sampling.temperature,
            top_k=min(sampling.top_k, self._vocab_size),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        self._model.start_canvas(self._state, slot, start)
        self._changed.add(slot)
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
