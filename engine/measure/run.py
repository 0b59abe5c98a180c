"""A model of random weights, measured: format by format, engine by engine, figure by figure.

`bench` is the table of contents. Three engines share a format's weights, because memory is sized by what an engine is
for: one slot and an ordinary context; two slots and a long one; many slots and a short one. Knows no clock.

Invariant: what was measured is in the document before the next thing begins, and a format's memory is free before the
next one's weights are made.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from engine.checkpoint import Checkpoint
from engine.engine import settle
from engine.interface import EngineError, EngineOptions
from engine.measure import figures as measuring
from engine.measure.ceilings import MeasuredCeilings, measure_ceilings
from engine.measure.clock import Clock
from engine.measure.figure import Document, Figure, Run
from engine.measure.figures import Bench
from engine.measure.memory import Memory
from engine.measure.options import BenchOptions
from engine.measure.profile import profile
from engine.measure.rig import Rig
from engine.measure.start_up import kernels_on_disk, start_up_figures
from engine.memory_plan import DEFAULT_SLOTS
from engine.options import require_fit
from engine.random_weights import plan_random, random_checkpoint
from engine.shapes import FORMAT_FLAGS, Shape, shape_of


def bench(options: BenchOptions) -> Iterator[Document]:
    """Measure what `options` say, which have been checked; yields the same growing document after every figure.

    Raises EngineError, before anything is measured, for a model that does not fit, with what it needs."""
    shape = shape_of(options.shape)
    engine_options = EngineOptions(
        model=options.shape, device=options.device, dtype=options.dtype, kernels=options.kernels
    )
    device, dtype, kernels = settle(engine_options)
    for form in options.formats:
        require_fit(plan_random(options.shape, form), engine_options, device, dtype, FORMAT_FLAGS)
    document = Document(described(options, device, dtype, kernels))
    ceilings = measure_ceilings(device)
    document.facts["ceilings"] = {
        "copy_gb_per_second": ceilings.copy,
        "read_gb_per_second": ceilings.read,
        "matrix_tflops": ceilings.matrix,
    }
    for form in options.formats:
        run = Run(form)
        document.runs.append(run)
        for _ in FormatBench(options, shape, run, device, dtype, kernels, ceilings).measure():
            yield document
        _free(device)
    yield document


class FormatBench:
    """One format of one shape."""

    def __init__(
        self,
        options: BenchOptions,
        shape: Shape,
        run: Run,
        device: torch.device,
        dtype: torch.dtype,
        kernels: str,
        ceilings: MeasuredCeilings,
    ) -> None:
        self._options = options
        self._shape = shape
        self._run = run
        self._device, self._dtype, self._kernels = device, dtype, kernels
        self._ceilings = ceilings
        self._memory = Memory(device)
        self._clock = Clock(device)
        self._plan = plan_random(options.shape, run.form)

    def measure(self) -> Iterator[None]:
        """Add figure after figure to the run."""
        if self._options.start_up:
            yield from self._add("start_up", partial(start_up_figures, self._options, self._run.form))
        self._clock.wait()
        began = time.monotonic()
        checkpoint = random_checkpoint(self._plan, self._device, self._dtype, seed=self._options.seed)
        self._run.facts |= {
            "weights_seconds": time.monotonic() - began,
            "weight_bytes": checkpoint.weight_bytes,
            "parameters": checkpoint.parameters,
        }
        self._memory.begin()
        wanted = set(self._options.only)
        if {"start", "step", "commit", "first-text", "memory"} & wanted or self._options.profile:
            yield from self._one_slot(checkpoint)
        if {"prefill", "prefix", "beside"} & wanted:
            yield from self._long(checkpoint)
        for slots in self._options.slots:  # an engine each, so that the largest that fits is measured too
            yield from self._group("slots", f"slots@{slots}", partial(self._slots_figure, checkpoint, slots))

    def _one_slot(self, checkpoint: Checkpoint) -> Iterator[None]:
        """What one reply is like, in an engine of one slot."""
        options, size = self._options, self._shape.config.canvas_length
        context = max(self._shape.context, max(options.prompts) + 8 * size)
        yield from self._group("start", "start", partial(self._start, checkpoint, context))
        if not options.profile and set(options.only) == {"start"}:
            return
        _free(self._device)  # what that engine held is no peak of this one
        self._memory.begin()
        built: list[Bench] = []

        def build() -> list[Figure]:
            built.append(self._bench(checkpoint, context, slots=1))
            return []

        yield from self._add("one slot", build)
        if not built:
            return
        (bench,) = built
        first = options.prompts[0]
        for length in options.prompts:
            yield from self._group("step", f"step@{length}", partial(measuring.step_figure, bench, length))
            yield from self._group("step", f"engine@{length}", partial(measuring.serving_figure, bench, length))
            yield from self._group("step", f"canvas@{length}", partial(measuring.canvas_figure, bench, length))
        yield from self._group("commit", f"commit@{first}", partial(measuring.commit_figures, bench, first))
        wanted = [self._shape.first_text, *((length, options.steps) for length in options.prompts)]
        for length, steps in dict.fromkeys(wanted):
            measure = partial(measuring.first_text_figure, bench, length, steps)
            yield from self._group("first-text", f"first_text@{length}/{steps}", measure)
        yield from self._group("memory", "memory", partial(self._memory_figure, bench, checkpoint, context))
        if options.profile:
            self._profile(bench, first)
            yield None
        bench.rig.close()

    def _start(self, checkpoint: Checkpoint, context: int) -> Figure:
        """Build an engine of as many slots as a server has, and bring it where a server says that it is ready."""
        found = kernels_on_disk()
        began = time.monotonic()
        rig = self._bench(checkpoint, context, slots=DEFAULT_SLOTS).rig
        built = time.monotonic()
        rig.warm_up()
        self._clock.wait()
        ready = time.monotonic()
        rig.close()
        return Figure(
            key="start",
            title=f"weights to ready, {DEFAULT_SLOTS} slots",
            value=ready - began,
            unit="s",
            detail={"engine_seconds": built - began, "kernels_compiled": kernels_on_disk() - found},
        )

    def _memory_figure(self, bench: Bench, checkpoint: Checkpoint, context: int) -> Figure:
        """Peak over all so far and a full context, its last canvas and commit included."""
        rig, size = bench.rig, self._shape.config.canvas_length
        rig.clear()
        rig.commit(rig.ids(context - size))
        rig.open()
        rig.step()
        rig.open()
        rig.step(commit=(rig.ids(size), 0))
        return self._memory.figure(checkpoint.weight_bytes, context)

    def _profile(self, bench: Bench, prefix: int) -> None:
        """The three kinds of passes, each after a warm-up."""
        rig = bench.rig
        chunk = rig.chunks(rig.ids(self._shape.prefill[0]))[0]
        size = self._shape.config.canvas_length
        passes: dict[str, Callable[[], None]] = {
            f"denoise step, prefix {prefix}": rig.step,
            f"first pass with a commit of {size}, prefix {prefix}": partial(rig.step, commit=(rig.ids(size), 0)),
            f"prefill of {len(chunk)} tokens, prefix {prefix}": partial(rig.commit, chunk),
        }
        for name, run in passes.items():
            for last in (False, False, False, True):
                rig.clear()
                rig.commit(rig.ids(prefix))
                rig.open()
                if run == rig.step:
                    run()  # so that the one that is watched is self-conditioned
                if last:
                    self._run.profiles[name] = profile(self._device, run)
                else:
                    run()

    def _long(self, checkpoint: Checkpoint) -> Iterator[None]:
        """What long prompts are like, in an engine of two slots."""
        shape, short = self._shape, self._options.prompts[0]
        longest = shape.prefill[-1]
        built: list[Bench] = []

        def build() -> list[Figure]:
            built.append(self._bench(checkpoint, longest + 2 * shape.config.canvas_length, slots=2))
            return []

        yield from self._add("long", build)
        if not built:
            return
        (bench,) = built
        for tokens in shape.prefill:
            yield from self._group("prefill", f"prefill@{tokens}", partial(measuring.prefill_figure, bench, tokens))
        yield from self._group("prefix", f"prefix@{longest}", partial(measuring.prefix_figure, bench, longest, short))
        turn = shape.prefill[1]
        measure = partial(measuring.turn_figure, bench, turn, shape.config.canvas_length, shape.first_text[1])
        yield from self._group("prefix", f"turn@{turn}", measure)
        measure = partial(measuring.beside_figure, bench, shape.beside, short)
        yield from self._group("beside", f"beside@{shape.beside}", measure)
        bench.rig.close()

    def _slots_figure(self, checkpoint: Checkpoint, slots: int) -> Figure:
        """Several canvases at a time, in an engine of just so many slots."""
        prefix = self._options.prompts[0]
        bench = self._bench(checkpoint, prefix + 2 * self._shape.config.canvas_length, slots=slots)
        try:
            return measuring.slots_figure(bench, slots, prefix)
        finally:
            bench.rig.close()

    def _bench(self, checkpoint: Checkpoint, context: int, *, slots: int) -> Bench:
        """An engine to measure. Raises OutOfMemoryError if there is no memory for its keys and values."""
        _free(self._device)
        try:
            rig = Rig(
                checkpoint,
                title=f"{self._options.shape} of random weights",
                kernels=self._kernels,
                context=min(context, self._shape.config.max_positions),
                slots=slots,
            )
        except EngineError as error:
            raise torch.OutOfMemoryError(str(error)) from error
        if rig.info.choices:
            self._run.facts["choices"] = "; ".join(rig.info.choices)
        return Bench(
            rig=rig,
            clock=self._clock,
            layout=self._plan.layout,
            ceilings=self._ceilings.ceilings,
            itemsize=self._dtype.itemsize,
            steps=self._options.steps,
        )

    def _group(self, group: str, key: str, measure: Callable[[], Figure | list[Figure]]) -> Iterator[None]:
        if group in self._options.only:
            yield from self._add(key, measure)

    def _add(self, key: str, measure: Callable[[], Figure | list[Figure]]) -> Iterator[None]:
        """Measure, or say why that was not possible; the next figure may still be."""
        try:
            made = measure()
        except torch.OutOfMemoryError as error:
            made = _missing(key, f"no memory: {error}")
        except EngineError as error:
            made = replace(_missing(key, str(error)), failed=True)
        found = made if isinstance(made, list) else [made]
        self._run.figures.extend(found)
        if found:
            yield None


def _missing(key: str, why: str) -> Figure:
    return Figure(key=key, title=key, value=None, unit="", note=" ".join(why.split()))


def _free(device: torch.device) -> None:
    """Give back what the last engine or format held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def described(options: BenchOptions, device: torch.device, dtype: torch.dtype, kernels: str) -> dict[str, object]:
    """What was measured, and on what."""
    gpu = device.type == "cuda"
    return {
        "shape": options.shape,
        "weights": "random",
        "seed": options.seed,
        "steps": options.steps,
        "prompts": list(options.prompts),
        "kernels": kernels,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "capability": list(torch.cuda.get_device_capability(device)) if gpu else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "torch": torch.__version__,
        "triton": _triton() if gpu else None,
        "cuda": torch.version.cuda,
    }


def _triton() -> str:
    import triton  # deferred: a machine without a GPU need not have it

    return str(triton.__version__)
