"""The engine: token ids in, token ids out. Import only from here; no torch is imported until `build_engine` runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.config import PUBLISHED_VISION, load_model_config, published_config
from engine.formats import choose, layout
from engine.interface import (
    MAX_DENOISING_STEPS,
    MAX_LOGPROBS,
    PRESETS,
    CanvasDone,
    CanvasDraft,
    CanvasRead,
    CanvasRequest,
    CheckpointError,
    Constraint,
    ConstraintError,
    DeviceMemory,
    Engine,
    EngineError,
    EngineInfo,
    EngineOptions,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    ImagePatches,
    PoolStats,
    QueueFull,
    Request,
    RequestTooLong,
    Sampling,
    Schedule,
    TokenLogprobs,
    Usage,
)
from engine.measure.figure import Detail, Document, Figure
from engine.measure.options import GROUPS as BENCH_GROUPS
from engine.measure.options import BenchOptions
from engine.measure.options import check as _check_bench
from engine.measure.report import COLUMNS as FIGURE_COLUMNS
from engine.measure.report import cells as figure_cells
from engine.measure.report import computed_lines, profile_lines, shown
from engine.measure.report import computed_steps as _computed_steps
from engine.memory_plan import CARDS, GB, MemoryPlan, Pools, default_chunk, plan_memory, plans, usable
from engine.quantization_config import load_quantization
from engine.shapes import FORMAT_CHOICES, shape_of
from engine.shapes import SHAPES as _SHAPES

BENCH_FORMATS = tuple(FORMAT_CHOICES)
SHAPES = tuple(_SHAPES)


def build_engine(options: EngineOptions) -> Engine:
    """Load a checkpoint and return a ready engine. Raises CheckpointError."""
    from engine.engine import DiffusionEngine  # deferred: imports torch

    return DiffusionEngine.from_options(options)


def build_random_engine(shape: str, form: str, options: EngineOptions, *, seed: int = 0) -> Engine:
    """A ready engine of random weights: `shape` one of SHAPES, `form` one of BENCH_FORMATS. Raises EngineError."""
    from engine.engine import DiffusionEngine  # deferred: imports torch

    return DiffusionEngine.from_random(shape, form, options, seed=seed)


def bench_shape(options: BenchOptions) -> Iterator[Document]:
    """Measure a model of random weights; yields the same growing document after every figure. Raises EngineError."""
    _check_bench(options)
    from engine.measure.run import bench  # deferred: imports torch

    return bench(options)


def computed_steps(options: BenchOptions) -> list[dict[str, Detail]]:
    """The least time of a denoise step on cards that are not here, one row a card and format. Raises EngineError."""
    _check_bench(options)
    return _computed_steps(shape_of(options.shape), options.formats, options.prompts[0])


def pull_checkpoint(name: str) -> Path:
    """Download what is missing of a checkpoint by its hub id, from where an earlier try broke off; returns its folder.
    Raises CheckpointError."""
    from engine.checkpoint import DESCRIPTION, resolve_folder  # deferred: imports torch

    return resolve_folder(name, (*DESCRIPTION, "*.safetensors"))


def quantize_checkpoint(
    source: str, target: Path, quantize: str, quantize_dense: str | None, *, device: str = "auto", progress: bool = True
) -> Path:
    """Write a quantised copy of a checkpoint into a new folder. Options as in EngineOptions. Raises EngineError."""
    from engine.export import write_quantized  # deferred: imports torch
    from engine.formats import choose
    from engine.options import choose_device

    return write_quantized(source, target, choose(quantize, quantize_dense), choose_device(device), progress=progress)


def memory_plans(folder: str | None) -> tuple[MemoryPlan, ...]:
    """What the checkpoint in a folder needs on a GPU, in every format it can be loaded in; None = the published
    one. Reads its configuration only. Raises CheckpointError."""
    if folder is None:
        return plans(replace(published_config(), vision=PUBLISHED_VISION))
    config = load_model_config(Path(folder))
    quantization = load_quantization(Path(folder))
    if quantization is None:
        return plans(config)
    own = layout(config, quantization.scheme_of)
    return (plan_memory(config, own, name=own.format or "bf16"),)


def planned_pools(options: EngineOptions, memory: int, *, gpu: bool) -> Pools | None:
    """How `memory` bytes would be dealt out to the model in the folder `options.model`, weights included on a GPU; None
    if it is not enough. Reads its configuration only. Raises EngineError."""
    folder = Path(options.model)
    config, quantization = load_model_config(folder, images=options.images), load_quantization(folder)
    if quantization is None:
        weights = layout(config, choice=choose(options.quantize, options.quantize_dense))
    else:
        weights = layout(config, quantization.scheme_of)
    chunk = options.commit_chunk or default_chunk(gpu, memory)
    plan = plan_memory(config, weights, name="", itemsize=2 if gpu else 4, gpu=gpu, commit_chunk=chunk)
    kv_bytes = None if options.kv_memory is None else int(options.kv_memory * GB)
    total = memory if gpu else memory + plan.weights + plan.working
    return plan.pools(total, slots=options.slots, context=options.context_length, kv_bytes=kv_bytes)


def stored_format(folder: str) -> str | None:
    """The schemes that a checkpoint's quantization_config names; None if it is not quantised.

    Raises CheckpointError for one that cannot be loaded."""
    quantization = load_quantization(Path(folder))
    return " and ".join(scheme.title for scheme, _ in quantization.groups) if quantization else None


__all__ = [
    "BENCH_FORMATS",
    "BENCH_GROUPS",
    "CARDS",
    "FIGURE_COLUMNS",
    "MAX_DENOISING_STEPS",
    "MAX_LOGPROBS",
    "PRESETS",
    "SHAPES",
    "BenchOptions",
    "CanvasDone",
    "CanvasDraft",
    "CanvasRead",
    "CanvasRequest",
    "CheckpointError",
    "Constraint",
    "ConstraintError",
    "Detail",
    "DeviceMemory",
    "Document",
    "Engine",
    "EngineError",
    "EngineInfo",
    "EngineOptions",
    "EngineStats",
    "Event",
    "Figure",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "ImagePatches",
    "MemoryPlan",
    "PoolStats",
    "Pools",
    "QueueFull",
    "Request",
    "RequestTooLong",
    "Sampling",
    "Schedule",
    "TokenLogprobs",
    "Usage",
    "bench_shape",
    "build_engine",
    "build_random_engine",
    "computed_lines",
    "computed_steps",
    "figure_cells",
    "memory_plans",
    "planned_pools",
    "profile_lines",
    "pull_checkpoint",
    "quantize_checkpoint",
    "shown",
    "stored_format",
    "usable",
]
