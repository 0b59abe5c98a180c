"""The engine: token ids in, token ids out. Import only from here; no torch is imported until `build_engine` runs."""

from engine.interface import (
    CanvasDone,
    CheckpointError,
    Engine,
    EngineError,
    EngineInfo,
    EngineOptions,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
    Sampling,
    Usage,
)


def build_engine(options: EngineOptions) -> Engine:
    """Load a checkpoint and return a ready engine. Raises CheckpointError."""
    from engine.engine import DiffusionEngine  # deferred: imports torch

    return DiffusionEngine.from_options(options)


__all__ = [
    "CanvasDone",
    "CheckpointError",
    "Engine",
    "EngineError",
    "EngineInfo",
    "EngineOptions",
    "Event",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "QueueFull",
    "RequestTooLong",
    "Sampling",
    "Usage",
    "build_engine",
]
