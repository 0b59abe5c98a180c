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
from importlib.metadata import version

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
    document = Document(_facts(options, device, dtype, kernels))
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
            yield from self._add(partial(start_up_figures, self._options, self._run.form), "start_up", "start-up")
        self._clock.wait()
        began = time.monotonic()
        checkpoint = random_checkpoint(self._plan, self._device, self._dtype, seed=self._options.seed)
        self._run.facts |= {
            "weights_seconds": time.monotonic() - began,
            "weight_bytes": checkpoint.weight_bytes,
            "parameters": checkpoint.parameters,
        }
        self._memory.begin()
        yield from self._one_slot(checkpoint)
        yield from self._long(checkpoint)
        yield from self._many_slots(checkpoint)

    def _one_slot(self, checkpoint: Checkpoint) -> Iterator[None]:
        shape, options = self._shape, self._options
        prompt, steps = shape.first_text
        context = max(shape.context, max(options.prompts) + 8 * shape.config.canvas_length)
        bench: Bench | None = None

        def start() -> Figure:
            nonlocal bench
            found = kernels_on_disk()
            began = time.monotonic()
            bench = self._bench(checkpoint, context, slots=1)
            bench.rig.commit(bench.rig.ids(shape.config.canvas_length))
            bench.rig.open()
            bench.rig.step()
            self._clock.wait()
            seconds = time.monotonic() - began
            detail = {"kernels_compiled": kernels_on_disk() - found}
            return Figure(key="start", title="weights to first step", value=seconds, unit="s", detail=detail)

        yield from self._add(start, "start", "weights to first step")
        if bench is None:
            return
        made: Bench = bench
        self._run.facts |= {"kernels": made.rig.info.kernels, "kv_bytes": made.rig.info.kv_bytes}
        for length in options.prompts:
            yield from self._group("step", partial(measuring.step_figure, made, length), f"step@{length}")
            yield from self._group("step", partial(measuring.canvas_figure, made, length), f"canvas@{length}")
        yield from self._group(
            "commit", partial(measuring.commit_figures, made, options.prompts[0]), f"commit@{options.prompts[0]}"
        )
        for length, count in dict.fromkeys([(prompt, steps), *((n, options.steps) for n in options.prompts)]):
            yield from self._group(
                "first-text",
                partial(measuring.first_text_figure, made, length, count),
                f"first_text@{length}/{count}",
            )
        yield from self._group("memory", partial(self._memory_figure, made, checkpoint, context), "memory")
        if options.profile:
            measuring.denoise_step(replace(made, steps=2), options.prompts[0])
            self._run.profile = profile(self._device, made.rig.step)
            yield None
        made.rig.close()

    def _memory_figure(self, bench: Bench, checkpoint: Checkpoint, context: int) -> Figure:
        """Peak over all so far and a full context, its last canvas and commit included."""
        rig, size = bench.rig, bench.rig.config.canvas_length
        rig.clear()
        rig.commit(rig.ids(context - size))
        rig.open()
        rig.step()
        rig.step(commit=(rig.ids(size), 0))
        return self._memory.figure(checkpoint.weight_bytes, context)

    def _long(self, checkpoint: Checkpoint) -> Iterator[None]:
        shape, options = self._shape, self._options
        if not {"prefill", "prefix", "beside"} & set(options.only):
            return
        longest = shape.prefill[-1]
        slots = 2 if "beside" in options.only else 1
        bench: Bench | None = None

        def build() -> list[Figure]:
            nonlocal bench
            bench = self._bench(checkpoint, longest + 2 * shape.config.canvas_length, slots=slots)
            return []

        yield from self._add(build, "long", f"engine of {slots} slots and a context of {longest}")
        if bench is None:
            return
        made: Bench = bench
        for tokens in shape.prefill:
            yield from self._group("prefill", partial(measuring.prefill_figure, made, tokens), f"prefill@{tokens}")
        short = options.prompts[0]
        yield from self._group("prefix", partial(measuring.prefix_figure, made, longest, short), f"prefix@{longest}")
        yield from self._group(
            "beside", partial(measuring.beside_figure, made, shape.beside, short), f"beside@{shape.beside}"
        )
        made.rig.close()

    def _many_slots(self, checkpoint: Checkpoint) -> Iterator[None]:
        if "slots" not in self._options.only:
            return
        prefix = self._options.prompts[0]
        for slots in self._options.slots:  # an engine each, so that the largest that fits is measured too

            def measure(slots: int = slots) -> Figure:
                bench = self._bench(checkpoint, prefix + 2 * self._shape.config.canvas_length, slots=slots)
                try:
                    return measuring.slots_figure(bench, slots, prefix)
                finally:
                    bench.rig.close()

            yield from self._group("slots", measure, f"slots@{slots}")

    def _bench(self, checkpoint: Checkpoint, context: int, *, slots: int) -> Bench:
        _free(self._device)
        rig = Rig(
            checkpoint,
            title=f"{self._options.shape} of random weights",
            kernels=self._kernels,
            context=min(context, self._shape.config.max_positions),
            slots=slots,
        )
        return Bench(
            rig=rig,
            clock=self._clock,
            layout=self._plan.layout,
            ceilings=self._ceilings.ceilings,
            itemsize=self._dtype.itemsize,
            steps=self._options.steps,
        )

    def _group(self, group: str, measure: Callable[[], Figure | list[Figure]], key: str) -> Iterator[None]:
        if group in self._options.only:
            yield from self._add(measure, key, key)

    def _add(self, measure: Callable[[], Figure | list[Figure]], key: str, title: str) -> Iterator[None]:
        """Measure, or say why that was not possible; the next figure may still be."""
        try:
            made = measure()
            found = made if isinstance(made, list) else [made]
        except torch.OutOfMemoryError as error:
            found = [_missing(key, title, f"no memory: {error}")]
        except EngineError as error:
            found = [_missing(key, title, f"failed: {error}")]
        self._run.figures.extend(found)
        if found:
            yield None


def _missing(key: str, title: str, why: str) -> Figure:
    return Figure(key=key, title=title, value=None, unit="", note=" ".join(why.split()))


def _free(device: torch.device) -> None:
    """Give back what the last engine or format held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _facts(options: BenchOptions, device: torch.device, dtype: torch.dtype, kernels: str) -> dict[str, object]:
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
        "triton": version("triton") if gpu else None,
        "cuda": torch.version.cuda,
    }
