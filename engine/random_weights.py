"""Random weights of a model's real sizes, made where they are used: no checkpoint, no second copy, seconds on a GPU.

What comes out is what loading gives: the same names, shapes, dtypes and storage as `checkpoint.read_checkpoint`. Packed
values are drawn as such, never quantised from something larger. Knows sizes and storage, no layer's maths.

Magnitudes are those of a trained model, so that nothing overflows, no row of logits is flat or one-hot, and a canvas
spreads over all experts:

    matrices            mean 0, standard deviation in**-0.5: unit rows in, unit rows out
    embedding           in**-0.5 too, so that times sqrt(hidden) it is a unit row, and logits have deviation 1
    router              1: scores of deviation 1, so every token has favourites of its own
    k_norm              2 * head_dim**-0.5: scores of attention have deviation 2
    post norms          (2 * layers)**-0.5: each layer adds 1/layers to a residual that starts at 1
    all other scales    1

Invariant: a tensor's values depend on its name, the seed and the kind of device only.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, CheckpointPlan
from engine.config import ModelConfig
from engine.formats import Spec, layout
from engine.kernels.weights import E2M1, Fp8Weight, Int4Weight, Nvfp4Weight, Weight
from engine.quantize import CHUNK, E4M3_MAX, allocate
from engine.shapes import format_choice, published_generation, shape_of

MATRICES = frozenset(
    {"embedding", "qkv", "out", "gate_up", "down", "router", "expert_gate_up", "expert_down"}
)  # all others are norms and scales
# The largest of some thousand normal values lies near four deviations, and a quantiser makes that e4m3's largest.
FP8_DEVIATION = E4M3_MAX / 4
E2M1_DEVIATION = (sum(value * value for value in E2M1) / len(E2M1)) ** 0.5
INT4_DEVIATION = (sum(value * value for value in range(-7, 8)) / 15) ** 0.5
# Codes of e4m3 from 0.5 to 1.875, eight to a factor of two: block scales differ as a real matrix's do.
BLOCK_SCALE_CODES = (48, 64)


def plan_random(shape: str, form: str) -> CheckpointPlan:
    """The plan of a random checkpoint, `shape` and `form` by name. Raises EngineError for an unknown name."""
    found, choice = shape_of(shape), format_choice(form)
    return CheckpointPlan(
        source=shape,
        path=Path(shape),
        config=found.config,
        generation=published_generation(),
        layout=layout(found.config, choice=choice),
        quantized=False,
        eight_bit=choice.eight_bit,
    )


def random_checkpoint(plan: CheckpointPlan, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Checkpoint:
    """Make what was planned on `device`; what is not quantised becomes `dtype`."""
    tensors = {
        name: random_weight(name, spec, plan.config, device, dtype, seed=seed)
        for name, spec in plan.layout.weights.items()
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that whoever times this times the making
        torch.cuda.empty_cache()
    return Checkpoint(
        path=plan.path,
        config=plan.config,
        generation=plan.generation,
        tensors=tensors,
        format=plan.layout.format or {torch.float32: "fp32"}.get(dtype, "bf16"),
        eight_bit=plan.eight_bit,
    )


def random_weight(
    name: str, spec: Spec, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, seed: int = 0
) -> Weight:
    """One of our weights, `name` as in `tensor_names.tensor_table`."""
    weight = allocate(spec, dtype, device)
    kind = name.rpartition(".")[2]
    if kind not in MATRICES:
        assert isinstance(weight, Tensor), f"{name} is never quantised"
        return weight.fill_(_scale(kind, spec, config))
    deviation = 1.0 if kind == "router" else spec.shape[-1] ** -0.5
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    match weight:
        case Tensor():
            return weight.normal_(0, deviation, generator=generator)
        case Fp8Weight(values, row_scale):
            _fill_fp8(values, generator)
            row_scale.fill_(_bfloat16(deviation / FP8_DEVIATION))
        case Nvfp4Weight(packed, block_scale, row_scale):
            packed.random_(0, 256, generator=generator)
            block_scale.view(torch.uint8).random_(*BLOCK_SCALE_CODES, generator=generator)
            row_scale.fill_(deviation / (E2M1_DEVIATION * _typical_scale()))
        case Int4Weight(packed, group_scale):
            _fill_int4(packed, generator)
            group_scale.uniform_(0.8, 1.2, generator=generator).mul_(deviation / INT4_DEVIATION)
    return weight


def _scale(kind: str, spec: Spec, config: ModelConfig) -> float:
    match kind:
        case "k_norm":
            return float(2 * spec.shape[0] ** -0.5)
        case "post_attention_norm" | "post_ffn_norm":
            return float((2 * len(config.layers)) ** -0.5)
        case _:
            return 1.0


def _fill_fp8(values: Tensor, generator: torch.Generator) -> None:
    """Normal values, rounded to e4m3, a chunk at a time: the type itself cannot be drawn."""
    flat = values.view(-1)
    drawn = torch.empty(min(CHUNK, flat.numel()), dtype=torch.bfloat16, device=values.device)
    for start in range(0, flat.numel(), CHUNK):
        place = flat[start : start + CHUNK]
        chunk = drawn[: place.numel()].normal_(0, FP8_DEVIATION, generator=generator)
        place.copy_(chunk.clamp_(-E4M3_MAX, E4M3_MAX))


def _fill_int4(packed: Tensor, generator: torch.Generator) -> None:
    """Two nibbles a byte, each uniform in 1..15: a nibble of 0 is -8, and values would not have mean 0."""
    flat = packed.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        place = flat[start : start + CHUNK].random_(0, 225, generator=generator)
        high = place // 15
        place.sub_(high * 15).add_(1).bitwise_or_((high + 1) << 4)


def _typical_scale() -> float:
    """Root mean square of the e4m3 scales drawn."""
    codes = torch.arange(*BLOCK_SCALE_CODES, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes.float().square().mean().sqrt().item()


def _bfloat16(value: float) -> float:
    return torch.tensor(value, dtype=torch.bfloat16).item()
