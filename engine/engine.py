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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch

from engine import held_canvas
from engine.assemble import assemble, choose_kernels
from engine.canvas import Canvas
from engine.check_request import check_images_of, check_request
from engine.checkpoint import Checkpoint, plan_checkpoint, read_checkpoint
from engine.config import GenerationDefaults
from engine.constrain import Guide
from engine.denoise import Denoiser, Model
from engine.device_memory import MemoryGauge
from engine.drafts import read_draft
from engine.formats import choose
from engine.images import runs
from engine.interface import (
    CanvasRequest,
    EngineError,
    EngineInfo,
    EngineOptions,
    EngineStats,
    Event,
    Request,
)
from engine.kv_cache import KVCache, KVPool
from engine.model.vision import VisionTower
from engine.options import (
    check_images,
    check_options,
    choose_chunk,
    choose_device,
    choose_dtype,
    choose_pools,
    chunk_beside,
    require_fit,
)
from engine.pages import PAGE
from engine.random_weights import plan_random, random_checkpoint
from engine.scheduler import CommitChunk, Scheduler, Slot
from engine.seating import Seating
from engine.shapes import FORMAT_FLAGS
from engine.warm_up import warm_up

logger = logging.getLogger(__name__)


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
        chunk_beside: int | None = None,
        vision: VisionTower | None = None,
    ) -> None:
        """One slot for each cache; together they must have pages for `info.context_length` positions and a canvas.
        `commit_chunk`, `chunk_beside`: prompt tokens a pass commits, the latter where other slots denoise in it.
        `vision`: the model's own, if it takes images."""
        self._info = info
        self._chunk = commit_chunk
        self._device = torch.device(info.device)
        self._model = model
        self._vision = vision
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
            chunk_beside=chunk_beside,
            context_length=info.context_length,
            eos_ids=info.eos_ids,
        )
        self._seating = Seating(self._scheduler, caches, commit_chunk=commit_chunk, canvas_length=info.canvas_length)
        self._memory = MemoryGauge(self._device)
        self._closed = False

    @classmethod
    def from_options(cls, options: EngineOptions) -> DiffusionEngine:
        """Load a checkpoint. Raises EngineError for an option that cannot be met or a model that does not fit, before
        anything is read, and CheckpointError for the rest."""
        started = time.monotonic()
        device, dtype, kernels = settle(options)
        plan = plan_checkpoint(options.model, choose(options.quantize, options.quantize_dense), images=options.images)
        require_fit(plan, options, device, dtype)
        checkpoint = read_checkpoint(plan, device, dtype, options.progress)
        engine = cls.from_checkpoint(checkpoint, options, kernels=kernels, started=started)
        engine.warm_up()
        return engine

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
        slots: int | None = None,
    ) -> DiffusionEngine:
        """An engine on weights that are on their device already; several may share them. `started`: when loading
        began, by `time.monotonic`. `slots`: so many, each with room for the whole context, whatever `options` say of
        memory. Raises EngineError if there is no memory for the context."""
        started = time.monotonic() if started is None else started
        config, schedule = checkpoint.config, checkpoint.generation
        device, dtype = checkpoint.device, checkpoint.dtype
        chunk = choose_chunk(options.commit_chunk, device)
        check_images(config, chunk)
        pools = choose_pools(config, checkpoint.weight_bytes, options, device, dtype, slots)
        try:
            pool = KVPool(config, pools.slots, pools.context, device, dtype, chunk=chunk, pages=pools.pages)
        except RuntimeError as error:  # torch's class for a failed allocation differs between devices
            raise EngineError(f"no memory for {pools.bytes} bytes of keys and values on {device}: {error}") from error
        model = assemble(config, checkpoint.tensors, pool, kernels, eight_bit=checkpoint.eight_bit)
        info = EngineInfo(
            model_path=options.model,
            canvas_length=config.canvas_length,
            context_length=pools.context,
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
            slots=pools.slots,
            page_length=PAGE,
            pages=pools.pages,
            image_tokens=config.vision.most_tokens if config.vision else 0,
            image_id=config.vision.image_id if config.vision else None,
            choices=model.choices,
        )
        logger.info(
            "%s: %.1f M parameters, format %s, run in %s on %s with %s kernels; %d slots, context %d, "
            "KV %.1f MiB in %d full and %d sliding pages; %.1f s",
            info.model_path,
            info.parameters / 1e6,
            info.format,
            info.dtype,
            info.device,
            info.kernels,
            info.slots,
            info.context_length,
            info.kv_bytes / 2**20,
            pools.full,
            pools.sliding,
            info.load_seconds,
        )
        return cls(
            model,
            pool.slots,
            schedule,
            info,
            max_waiting=options.max_waiting,
            commit_chunk=chunk,
            chunk_beside=chunk_beside(device, config.canvas_length, chunk),
            vision=model.vision,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture what the first replies need; nothing to do for ops that are neither compiled nor
        captured. No request may be running."""
        if self._info.kernels != "triton":
            return
        started = time.monotonic()
        caches = [seat.cache for seat in self._seating.seats]
        canvas, chunk = self._info.canvas_length, self._chunk
        try:
            warm_up(self._denoiser, caches, canvas_length=canvas, chunk=min(chunk, self._info.context_length - canvas))
        except OSError as error:
            raise EngineError(f"{error}: make room for Triton's cache of kernels (TRITON_CACHE_DIR)") from error
        logger.info("kernels are ready: %.1f s", time.monotonic() - started)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def parts(self) -> Parts:
        """What passes are made of, for those who measure them one by one instead of serving requests."""
        return Parts(self._model, self._denoiser, tuple(seat.cache for seat in self._seating.seats))

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not finished, or the end of a reply is still to be committed."""
        return not self._closed and self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLong, QueueFull, or EngineError for a request that makes no sense."""
        self._require_open()
        check_request(request, self._info.vocab_size, self._info.canvas_length)
        check_images_of(request, self._vision.config if self._vision else None)
        self._scheduler.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request; the next step returns its Finished("cancelled"). Unknown or finished ids are ignored."""
        if self._closed:
            return
        slot = self._scheduler.cancel(request_id)
        if slot is not None:
            self._seating.vacate(self._scheduler.slots[slot])

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance by one unit of work and return what happened."""
        self._require_open()
        self._seating.admit()  # waiting requests take free slots, and go on from what is committed of their prompts
        self._seating.make_room()
        chunks = self._scheduler.next_commits()  # parts of prompts, finished canvases; when idle, the end of a reply
        ready = self._scheduler.ready()  # slots whose prefix is committed, by this very pass at the latest
        if chunks or ready:
            self._pass(chunks, ready)
        return self._scheduler.collect()  # first done, first out

    def stats(self) -> EngineStats:
        """A snapshot, taken between two steps."""
        self._require_open()
        return replace(self._seating.stats(), memory=self._memory.read())

    def close(self) -> None:
        """Free the model's memory. Requests still running are dropped without an event. May be called again."""
        if self._closed:
            return
        self._closed = True
        del self._model, self._denoiser, self._seating, self._vision
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, chunks: Sequence[CommitChunk], ready: Sequence[Slot]) -> None:
        """One pass: commit chunks and denoise the canvases of all `ready` slots, opening those that have none."""
        seats = self._seating.seats
        try:
            canvases = [self._open_canvas(slot) for slot in ready]
            passing = [canvas.state == "open" for canvas in canvases]  # others have a constraint that left no choice
            if any(passing) or chunks:
                self._look(chunks)
                self._denoiser.step(
                    list(compress(canvases, passing)),
                    [seats[slot.index].cache for slot in compress(ready, passing)],
                    [(chunk.token_ids, seats[chunk.slot].cache) for chunk in chunks],
                )
        except Exception as error:
            self._contain(error, chunks, ready)
            return
        self._seating.committed(chunks)
        for slot, canvas, passed in zip(ready, canvases, passing, strict=True):
            try:
                self._read(slot, canvas, passed=passed)
            except Exception as error:
                self._contain(error, (), (slot,))

    def _read(self, slot: Slot, canvas: Canvas, *, passed: bool) -> None:
        """What has become of a slot's canvas."""
        if passed:
            self._scheduler.passed(slot, redrawn=canvas.just_redrawn)
            guide = self._seating.seats[slot.index].guide
            if guide is not None and canvas.state == "open":
                guide.follow(canvas)
            if (draft := read_draft(self._denoiser, canvas, self._requested(slot))) is not None:
                self._scheduler.sketch(draft)
        self._settle(slot, canvas)

    def _look(self, chunks: Sequence[CommitChunk]) -> None:
        """Have the vision tower see the images that are committed now."""
        if self._vision is None or not chunks:
            return
        shown = [image for slot in self._scheduler.running for image in self._requested(slot).images]
        if shown and (numbers := {run.number for chunk in chunks for run in runs(chunk.token_ids)}):
            self._vision.look([image for image in shown if image.number in numbers])

    def _open_canvas(self, slot: Slot) -> Canvas:
        """The slot's canvas; a new one if its last is done."""
        seat, reply = self._seating.seats[slot.index], slot.reply
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
            said=reply.said,
            guided=seat.guide is not None,
        )
        if seat.guide is not None:
            seat.guide.begin(seat.canvas)
        return seat.canvas

    def _settle(self, slot: Slot, canvas: Canvas) -> None:
        """Deliver a canvas that is done; end the reply of one that cannot be; leave an open one alone."""
        request = self._requested(slot)
        if canvas.state == "open" and not held_canvas.ends(request, canvas):
            return
        if isinstance(request, CanvasRequest) and canvas.state in ("open", "done"):
            self._scheduler.conclude(slot, held_canvas.read_held(self._denoiser, canvas, request))
        elif canvas.state == "done":
            logprobs = () if canvas.logprobs is None else self._denoiser.logprobs(canvas)
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
        self._seating.seats[slot.index].canvas = None
        if slot.reply is None and not slot.rest:
            self._seating.vacate(slot, suspect=canvas.state == "non-finite")

    @staticmethod
    def _requested(slot: Slot) -> Request:
        assert slot.reply is not None, f"slot {slot.index} is empty"
        return slot.reply.request

    def _contain(self, error: Exception, chunks: Sequence[CommitChunk], ready: Sequence[Slot]) -> None:
        """End the request that `error` hit. A device that failed cannot serve the others: re-raise.

        A pass of several slots does not say whose fault it is, and it changed nothing: each slot goes again, alone.
        Running out of memory is not a failure of the device; torch reports it as another class.
        """
        if isinstance(error, torch.AcceleratorError):
            raise error
        involved = {slot.index: slot for slot in ready}
        involved |= {chunk.slot: self._scheduler.slots[chunk.slot] for chunk in chunks}
        if len(involved) > 1:
            for index, slot in involved.items():
                self._pass([chunk for chunk in chunks if chunk.slot == index], [slot] if slot in ready else [])
            return
        logger.error("a request failed inside the engine", exc_info=error)
        said = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        for slot in involved.values():
            slot.rest = ()
            if slot.reply is not None:
                self._scheduler.fail(slot, "error", said)
            self._seating.vacate(slot, suspect=True)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")


def settle(options: EngineOptions) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and the op set's name. Raises EngineError for an option that cannot be met."""
    check_options(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    return device, dtype, choose_kernels(options.kernels, device, dtype)
