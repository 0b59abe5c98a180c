"""The engine: requests in, events out, one unit of work a step. `DiffusionEngine.step` is the table of contents.

Joins the parts that know more than one thing each must not: the scheduler (no tensors), the denoiser (no requests)
and the model with one KV cache a slot. Knows no text, no HTTP, no threads.

Invariant: what goes wrong for one request ends that request with Finished("error") and the others go on; only a
failure of the device itself leaves `step`.

The last canvas of a context may lie partly beyond it. Its ids there are denoised like the others, at their ordinary
positions, but are neither delivered nor committed, so no memory is needed for them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine import held_canvas
from engine.assemble import assemble, choose_kernels
from engine.canvas import Canvas
from engine.check_request import check_request
from engine.checkpoint import Checkpoint, plan_checkpoint, read_checkpoint
from engine.config import GenerationDefaults
from engine.constrain import Guide
from engine.denoise import Denoiser, Model
from engine.formats import choose
from engine.interface import (
    CanvasRequest,
    ConstraintError,
    EngineError,
    EngineInfo,
    EngineOptions,
    Event,
    Request,
)
from engine.kv_cache import KVCache, KVPool
from engine.options import (
    check_options,
    choose_context,
    choose_device,
    choose_dtype,
    require_fit,
)
from engine.random_weights import plan_random, random_checkpoint
from engine.scheduler import CommitChunk, Scheduler, Slot
from engine.shapes import FORMAT_FLAGS

logger = logging.getLogger(__name__)

SLOTS = 1  # requests served at a time


@dataclass
class Seat:
    """The tensors of one slot: its committed prefix and the canvas being denoised, if one is open."""

    cache: KVCache
    canvas: Canvas | None = None
    guide: Guide | None = None  # of a constrained reply, from its first canvas on
    said: Counter[int] = field(default_factory=Counter)  # ids of the reply's canvases so far, for penalties

    def clear(self) -> None:
        self.cache.reset()
        self.canvas = self.guide = None
        self.said.clear()


@dataclass(frozen=True)
class Parts:
    """The model, the denoiser of its canvases, and each slot's cache."""

    model: Model
    denoiser: Denoiser
    caches: tuple[KVCache, ...]


class DiffusionEngine:
    """One loaded model and the requests it serves. Not thread-safe."""

    def __init__(
        self,
        model: Model,
        caches: Sequence[KVCache],
        schedule: GenerationDefaults,
        info: EngineInfo,
        *,
        max_waiting: int,
        commit_chunk: int,
    ) -> None:
        """One slot for each cache, which must hold `info.context_length` positions."""
        self._info = info
        self._schedule = schedule
        self._device = torch.device(info.device)
        self._model = model
        self._seats = tuple(Seat(cache) for cache in caches)
        self._denoiser = Denoiser(
            model,
            schedule,
            slots=len(caches),
            canvas_length=info.canvas_length,
            vocab_size=info.vocab_size,
            device=self._device,
            graphs=info.kernels == "triton",
        )
        self._scheduler = Scheduler(
            slots=len(caches),
            max_waiting=max_waiting,
            commit_chunk=commit_chunk,
            context_length=info.context_length,
            eos_ids=info.eos_ids,
        )
        self._closed = False

    @classmethod
    def from_options(cls, options: EngineOptions) -> DiffusionEngine:
        """Load a checkpoint. Raises EngineError for an option that cannot be met or a model that does not fit, before
        anything is read, and CheckpointError for the rest."""
        started = time.monotonic()
        device, dtype, kernels = settle(options)
        plan = plan_checkpoint(options.model, choose(options.quantize, options.quantize_dense))
        require_fit(plan, options, device, dtype)
        checkpoint = read_checkpoint(plan, device, dtype, options.progress)
        return cls.from_checkpoint(checkpoint, options, kernels=kernels, started=started)

    @classmethod
    def from_random(cls, shape: str, form: str, options: EngineOptions, *, seed: int = 0) -> DiffusionEngine:
        """A model without a checkpoint: random weights of a shape and format by name, see `engine.shapes`.

        `options.model` is a title only. Raises EngineError as `from_options` does."""
        started = time.monotonic()
        device, dtype, kernels = settle(options)
        plan = plan_random(shape, form)
        require_fit(plan, options, device, dtype, FORMAT_FLAGS)
        checkpoint = random_checkpoint(plan, device, dtype, seed=seed)
        return cls.from_checkpoint(checkpoint, options, kernels=kernels, started=started)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        kernels: str,
        started: float | None = None,
        slots: int = SLOTS,
    ) -> DiffusionEngine:
        """An engine on weights that are on their device already; several may share them. `started`: when loading
        began, by `time.monotonic`. Raises EngineError if there is no memory for the context."""
        started = time.monotonic() if started is None else started
        config, schedule = checkpoint.config, checkpoint.generation
        device, dtype = checkpoint.device, checkpoint.dtype
        context = choose_context(options.context_length, config, device, dtype)
        try:
            pool = KVPool(config, slots, context, device, dtype, chunk=options.commit_chunk)
        except RuntimeError as error:  # torch's class for a failed allocation differs between devices
            raise EngineError(f"no memory for a context of {context} positions on {device}: {error}") from error
        info = EngineInfo(
            model_path=options.model,
            canvas_length=config.canvas_length,
            context_length=context,
            vocab_size=config.vocab_size,
            eos_ids=schedule.eos_ids,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            format=checkpoint.format,
            kernels=kernels,
            parameters=checkpoint.parameters,
            weight_bytes=checkpoint.weight_bytes,
            kv_bytes=pool.bytes,
            load_seconds=time.monotonic() - started,
        )
        logger.info(
            "%s: %.1f M parameters, format %s, run in %s on %s with %s kernels; context %d, KV %.1f MiB; %.1f s",
            info.model_path,
            info.parameters / 1e6,
            info.format,
            info.dtype,
            info.device,
            info.kernels,
            info.context_length,
            info.kv_bytes / 2**20,
            info.load_seconds,
        )
        return cls(
            assemble(config, checkpoint.tensors, pool, kernels),
            pool.slots,
            schedule,
            info,
            max_waiting=options.max_waiting,
            commit_chunk=options.commit_chunk,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def parts(self) -> Parts:
        """What passes are made of, for those who measure them one by one instead of serving requests."""
        return Parts(self._model, self._denoiser, tuple(seat.cache for seat in self._seats))

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not finished."""
        return not self._closed and self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLong, QueueFull, or EngineError for a request that makes no sense."""
        self._require_open()
        check_request(request, self._info.vocab_size, self._info.canvas_length)
        self._scheduler.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request; the next step returns its Finished("cancelled"). Unknown or finished ids are ignored."""
        if self._closed:
            return
        slot = self._scheduler.cancel(request_id)
        if slot is not None:
            self._seats[slot].clear()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance by one unit of work and return what happened."""
        self._require_open()
        self._scheduler.admit()  # waiting requests take free slots
        chunk = self._scheduler.next_commit()  # part of a prompt, or a finished canvas
        ready = self._scheduler.ready()  # slots whose prefix is committed, by this very pass at the latest
        if chunk or ready:
            self._pass(chunk, ready)
        return self._scheduler.collect()  # first done, first out

    def close(self) -> None:
        """Free the model's memory. Requests still running are dropped without an event. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._seats = ()
        del self._model, self._denoiser
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, chunk: CommitChunk | None, ready: Sequence[Slot]) -> None:
        """One pass: commit a chunk and denoise the canvases of all `ready` slots, opening those that have none."""
        commits = []
        try:
            if chunk is not None:
                commits.append((chunk.token_ids, self._seats[chunk.slot].cache))
            canvases = [self._open_canvas(slot) for slot in ready]
            # what a constraint leaves no choice about needs no pass
            running = [(slot, canvas) for slot, canvas in zip(ready, canvases, strict=True) if canvas.state == "open"]
            caches = [self._seats[slot.index].cache for slot, _ in running]
            if running or commits:
                self._denoiser.step([canvas for _, canvas in running], caches, commits)
        except Exception as error:
            self._contain(error, chunk, ready)
            return
        for slot, canvas in running:
            self._scheduler.passed(slot, redrawn=canvas.just_redrawn)
            self._follow(slot, canvas)
        for slot, canvas in zip(ready, canvases, strict=True):
            if slot.reply is not None:  # its constraint did not fail
                self._settle(slot, canvas)

    def _open_canvas(self, slot: Slot) -> Canvas:
        """The slot's canvas; a new one if its last is done."""
        seat, reply = self._seats[slot.index], slot.reply
        assert reply is not None, f"slot {slot.index} is ready but empty"
        request = reply.request
        if seat.canvas is not None:
            return seat.canvas
        if isinstance(request, CanvasRequest):
            seat.canvas = held_canvas.open_held(self._denoiser, slot.index, request)
            return seat.canvas
        if request.constraint is not None and seat.guide is None:
            seat.guide = Guide(request.constraint, self._denoiser)
        seat.canvas = self._denoiser.open(
            slot.index,
            request.sampling,
            index=reply.canvases,
            schedule=request.schedule,
            logprobs=request.logprobs,
            said=seat.said,
            guided=seat.guide is not None,
        )
        if seat.guide is not None:
            seat.guide.begin(seat.canvas)
        return seat.canvas

    def _follow(self, slot: Slot, canvas: Canvas) -> None:
        """Keep a constrained canvas to its constraint; end the reply if that cannot go on."""
        guide = self._seats[slot.index].guide
        if guide is None or canvas.state != "open":
            return
        try:
            guide.follow(canvas)
        except ConstraintError as error:
            logger.error("a constraint failed", exc_info=error)
            self._scheduler.fail(slot, "error", str(error))
            self._vacate(slot)

    def _settle(self, slot: Slot, canvas: Canvas) -> None:
        """Deliver a canvas that is done; end the reply of one that cannot be; leave an open one alone."""
        request = self._requested(slot)
        if canvas.state == "open" and not held_canvas.ends(request, canvas):
            return
        if isinstance(request, CanvasRequest) and canvas.state in ("open", "done"):
            self._scheduler.conclude(slot, held_canvas.read_held(self._denoiser, canvas, request))
        elif canvas.state == "done":
            logprobs = () if canvas.logprobs is None else self._denoiser.logprobs(canvas)
            if canvas.penalised:
                self._seats[slot.index].said.update(canvas.result)
            self._scheduler.deliver(slot, canvas.result, canvas.steps, logprobs)
        elif canvas.state == "unconverged":
            logger.warning("canvas %d did not converge in %d steps; the reply ends", canvas.index, canvas.steps)
            self._scheduler.fail(
                slot,
                "length",
                f"canvas {canvas.index} did not converge in {canvas.steps} denoise steps, drawn twice; "
                "the reply ends before it",
            )
        else:
            logger.error("non-finite logits at canvas %d, step %d", canvas.index, canvas.steps)
            self._scheduler.fail(
                slot, "error", f"the model's logits were not finite at canvas {canvas.index}, step {canvas.steps}"
            )
        self._vacate(slot)

    @staticmethod
    def _requested(slot: Slot) -> Request:
        assert slot.reply is not None, f"slot {slot.index} is empty"
        return slot.reply.request

    def _vacate(self, slot: Slot) -> None:
        """Forget the slot's canvas, and its prefix too if its request is over."""
        seat = self._seats[slot.index]
        seat.canvas = None
        if slot.reply is None:
            seat.clear()

    def _contain(self, error: Exception, chunk: CommitChunk | None, ready: Sequence[Slot]) -> None:
        """End the request that `error` hit. A device that failed cannot serve the others: re-raise.

        A pass of several slots does not say whose fault it is, and it changed nothing: each slot goes again, alone.
        Running out of memory is not a failure of the device; torch reports it as another class.
        """
        if isinstance(error, torch.AcceleratorError):
            raise error
        involved = {slot.index: slot for slot in ready}
        if chunk is not None:
            involved.setdefault(chunk.slot, self._scheduler.slots[chunk.slot])
        if len(involved) > 1:
            for index, slot in involved.items():
                own = chunk if chunk is not None and chunk.slot == index else None
                self._pass(own, [slot] if slot in ready else [])
            return
        logger.error("a request failed inside the engine", exc_info=error)
        for slot in involved.values():
            self._scheduler.fail(slot, "error", f"{type(error).__name__}: {error}")
            self._vacate(slot)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")


def settle(options: EngineOptions) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and the op set's name. Raises EngineError for an option that cannot be met."""
    check_options(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    return device, dtype, choose_kernels(options.kernels, device, dtype)
