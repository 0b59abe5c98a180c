"""Models by name, for benchmarks and plans that have no checkpoint at hand: sizes, schedule and what to measure.

Knows no tensors and no torch. Invariant: "26b-a4b" is google/diffusiongemma-26B-A4B-it, key by key; every matrix of
every shape can be stored in every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import GenerationDefaults, LayerConfig, ModelConfig, published_config
from engine.formats import Choice
from engine.interface import EngineError
from engine.memory_plan import CHOICES

# As `--format` spells them: "nvfp4+fp8" is nvfp4 with attention and dense MLP in fp8.
FORMAT_CHOICES: Mapping[str, Choice] = {name.replace(", dense ", "+"): choice for name, choice in CHOICES.items()}
FORMAT_FLAGS: Mapping[str, str] = {name: f"--format {name.replace(', dense ', '+')}" for name in CHOICES}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, and the lengths in tokens at which it is worth measuring."""

    name: str
    config: ModelConfig
    prefill: tuple[int, ...]  # ascending; the last is also the long prefix of a step
    beside: int  # a prompt that arrives while another reply is being written
    first_text: tuple[int, int]  # prompt tokens and denoise steps until the first text
    context: int  # at which memory is measured


def published_generation() -> GenerationDefaults:
    """The schedule of google/diffusiongemma-26B-A4B-it."""
    return GenerationDefaults(
        max_denoising_steps=48,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_ids=frozenset({1, 106, 50}),
        pad_id=0,
    )


def tiny_config() -> ModelConfig:
    """The published model's structure in a size for tests on a CPU."""
    sliding = LayerConfig(kind="sliding", head_dim=32, kv_heads=2, rope_theta=1e4, rope_partial=1.0)
    full = LayerConfig(kind="full", head_dim=64, kv_heads=1, rope_theta=1e6, rope_partial=0.25)
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        canvas_length=16,
        max_positions=1024,
        sliding_window=32,
        num_heads=4,
        rms_norm_eps=1e-6,
        final_softcap=30.0,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        top_k_experts=2,
        layers=(sliding, sliding, full),
    )


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="26b-a4b",
            config=published_config(),
            prefill=(2048, 8192, 32_768),
            beside=16_384,
            first_text=(2048, 12),
            context=16_384,
        ),
        Shape(name="tiny", config=tiny_config(), prefill=(64, 128, 256), beside=128, first_text=(64, 4), context=128),
    )
}


def shape_of(name: str) -> Shape:
    """The shape of that name. Raises EngineError, which lists the known ones."""
    if name not in SHAPES:
        raise EngineError(f"unknown shape {name!r}; choose {' or '.join(SHAPES)}")
    return SHAPES[name]


def format_choice(name: str) -> Choice:
    """What the format of that name stores quantised. Raises EngineError, which lists the known ones."""
    if name not in FORMAT_CHOICES:
        raise EngineError(f"unknown format {name!r}; choose {', '.join(FORMAT_CHOICES)}")
    return FORMAT_CHOICES[name]
