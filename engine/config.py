"""The model's sizes and the denoising schedule, read from a checkpoint's config.json and generation_config.json.

Parsing goes through transformers' own config classes, so that their defaults and per-layer overrides hold here too.
Knows no tensors and no torch.

Invariant: what this engine does not compute exactly (another activation, biases, another RoPE type, ...) is a
CheckpointError naming the key, never a value quietly ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.interface import CheckpointError

MODEL_TYPE = "diffusion_gemma"
# A checkpoint with one of these takes images: how they are cut up is as much part of it as its weights.
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs between layers. `rope_partial` is the share of the head that RoPE rotates ("proportional")."""

    kind: Literal["sliding", "full"]
    head_dim: int
    kv_heads: int
    rope_theta: float
    rope_partial: float

    @property
    def turned(self) -> int:
        """Columns of each half of a head that RoPE turns: the first ones."""
        return int(self.rope_partial * self.head_dim // 2)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of the vision tower."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    patch_size: int
    pooling: int  # patches along a side of the square that becomes one soft token
    positions: int  # rows or columns of patches that there are embeddings for
    standardize: bool
    rms_norm_eps: float
    most_tokens: int  # soft tokens an image is cut up into at most
    image_id: int
    document: str  # vision_config as JSON: transformers' own tower is built from it


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of one model."""

    vocab_size: int
    hidden_size: int
    canvas_length: int
    max_positions: int
    sliding_window: int  # a query sees itself and the window - 1 positions before it
    num_heads: int
    rms_norm_eps: float
    final_softcap: float
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    layers: tuple[LayerConfig, ...]
    vision: VisionConfig | None = None  # None = the model takes no images, or is not to


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The checkpoint's denoising schedule and its special ids."""

    max_denoising_steps: int
    t_min: float
    t_max: float
    entropy_bound: float  # nats
    stability_threshold: int
    confidence_threshold: float  # nats
    eos_ids: frozenset[int]
    pad_id: int


def published_config() -> ModelConfig:
    """The sizes of google/diffusiongemma-26B-A4B-it, for plans and benchmarks that have no checkpoint at hand."""
    sliding = LayerConfig(kind="sliding", head_dim=256, kv_heads=8, rope_theta=1e4, rope_partial=1.0)
    full = LayerConfig(kind="full", head_dim=512, kv_heads=2, rope_theta=1e6, rope_partial=0.25)
    return ModelConfig(
        vocab_size=262_144,
        hidden_size=2816,
        canvas_length=256,
        max_positions=262_144,
        sliding_window=1024,
        num_heads=16,
        rms_norm_eps=1e-6,
        final_softcap=30.0,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        layers=(*(sliding,) * 5, full) * 5,
    )


# of google/diffusiongemma-26B-A4B-it
PUBLISHED_VISION = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    layers=27,
    heads=16,
    kv_heads=16,
    head_dim=72,
    patch_size=16,
    pooling=3,
    positions=10_240,
    standardize=True,
    rms_norm_eps=1e-6,
    most_tokens=280,
    image_id=258_880,
    document="",
)


def takes_images(folder: Path) -> bool:
    """Whether a checkpoint says how images are to be cut up."""
    return any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)


def load_model_config(folder: Path, *, images: bool = True) -> ModelConfig:
    """Read config.json. Raises CheckpointError for another architecture or a feature the engine lacks.

    `images`: with the vision tower, if the checkpoint takes images.

    quantization_config is not read here but in `engine.quantization_config`."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {raw.get('model_type')!r}, but only {MODEL_TYPE!r} "
            "can be served; choose a DiffusionGemma checkpoint"
        )
    raw.pop("quantization_config", None)  # how weights are stored is no size of the model
    parsed = _parse(raw, folder)
    config = _model_config(parsed, folder)
    return replace(config, vision=_vision_config(parsed, folder)) if images and takes_images(folder) else config


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read generation_config.json. Missing schedule keys take transformers' defaults, a missing pad_token_id is 0;
    a missing file or eos_token_id is a CheckpointError, because replies would never end."""
    path = folder / "generation_config.json"
    raw = read_json(path)
    sampler = raw.get("sampler_config", {"_cls_name": "EntropyBoundSamplerConfig"})
    if not isinstance(sampler, dict) or sampler.get("_cls_name") != "EntropyBoundSamplerConfig":
        raise CheckpointError(f"{path}: sampler_config must be an EntropyBoundSamplerConfig, not {sampler!r}")
    eos = raw.get("eos_token_id")
    eos_ids: list[Any] = eos if isinstance(eos, list) else [eos]
    if not eos_ids or not all(type(token_id) is int for token_id in eos_ids):
        raise CheckpointError(f"{path}: eos_token_id must be an id or a list of ids, not {eos!r}")
    defaults = GenerationDefaults(
        max_denoising_steps=int(_number(path, raw, "max_denoising_steps", 48, minimum=1)),
        t_min=_number(path, raw, "t_min", 0.4, minimum=0),
        t_max=_number(path, raw, "t_max", 0.8, minimum=0),
        entropy_bound=_number(path, sampler, "entropy_bound", 0.1, minimum=0),
        stability_threshold=int(_number(path, raw, "stability_threshold", 1, minimum=0)),
        confidence_threshold=_number(path, raw, "confidence_threshold", 0.005, minimum=0),
        eos_ids=frozenset(eos_ids),
        pad_id=int(_number(path, raw, "pad_token_id", 0, minimum=0)),
    )
    if defaults.t_max <= defaults.t_min:
        raise CheckpointError(f"{path}: t_max ({defaults.t_max}) must be above t_min ({defaults.t_min})")
    return defaults


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint. Raises CheckpointError if it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}; download it again")
    return value


def _number(path: Path, values: dict[str, Any], key: str, default: float, *, minimum: float) -> float:
    value = values.get(key)
    if value is None:  # absent or null: transformers treats both as unset
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(f"{path}: {key} must be a number of at least {minimum}, not {value!r}")
    if isinstance(default, int) and not isinstance(value, int):
        raise CheckpointError(f"{path}: {key} must be a whole number, not {value!r}")
    return value


def _parse(raw: dict[str, Any], folder: Path) -> Any:
    """transformers' config object (untyped there)."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import DiffusionGemmaConfig  # deferred: slow to import, and this module is imported for its types

    try:
        return DiffusionGemmaConfig.from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a valid {MODEL_TYPE} configuration: {error}; download it again"
        ) from error


def _model_config(parsed: Any, folder: Path) -> ModelConfig:
    text = parsed.text_config
    path = folder / "config.json"
    _require_supported(parsed, path)
    return ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        canvas_length=parsed.canvas_length,
        max_positions=text.max_position_embeddings,
        sliding_window=text.sliding_window,
        num_heads=text.num_attention_heads,
        rms_norm_eps=text.rms_norm_eps,
        final_softcap=text.final_logit_softcapping,
        intermediate_size=text.intermediate_size,
        moe_intermediate_size=text.moe_intermediate_size,
        num_experts=text.num_experts,
        top_k_experts=text.top_k_experts,
        layers=tuple(_layer_config(text, index, path) for index in range(text.num_hidden_layers)),
    )


def _require_supported(parsed: Any, path: Path) -> None:
    text = parsed.text_config
    required = {
        "hidden_activation": text.hidden_activation == "gelu_pytorch_tanh",
        "attention_bias": text.attention_bias is False,
        "use_bidirectional_attention": text.use_bidirectional_attention in (None, "vision"),
        "tie_word_embeddings": text.tie_word_embeddings is True,
        "sliding_window": text.sliding_window >= 2,
        "final_logit_softcapping": text.final_logit_softcapping is not None and text.final_logit_softcapping > 0,
        "num_experts": text.num_experts is not None and text.num_experts >= 1,
        "top_k_experts": text.top_k_experts is not None and 1 <= text.top_k_experts <= (text.num_experts or 0),
        "moe_intermediate_size": text.moe_intermediate_size is not None and text.moe_intermediate_size >= 1,
    }
    for key, supported in required.items():
        if not supported:
            raise CheckpointError(f"{path}: text_config.{key} = {getattr(text, key)!r} is not supported by this engine")
    if parsed.tie_word_embeddings is not True:
        raise CheckpointError(f"{path}: tie_word_embeddings = {parsed.tie_word_embeddings!r} is not supported")
    if not parsed.canvas_length or parsed.canvas_length < 1:
        raise CheckpointError(f"{path}: canvas_length must be at least 1, not {parsed.canvas_length!r}")
    if len(text.layer_types) != text.num_hidden_layers:
        raise CheckpointError(
            f"{path}: layer_types names {len(text.layer_types)} layers, but num_hidden_layers is "
            f"{text.num_hidden_layers}"
        )


def _vision_config(parsed: Any, folder: Path) -> VisionConfig:
    vision, path = parsed.vision_config, folder / "config.json"
    required = {
        "model_type": vision.model_type == "gemma4_vision",
        "use_clipped_linears": not getattr(vision, "use_clipped_linears", False),
        "attention_bias": not getattr(vision, "attention_bias", False),
    }
    for key, supported in required.items():
        if not supported:
            raise CheckpointError(
                f"{path}: vision_config.{key} = {getattr(vision, key)!r} is not supported by this engine; "
                "start it with --images off to serve text only"
            )
    if parsed.text_config.use_bidirectional_attention != "vision":
        raise CheckpointError(
            f"{path}: images are served only where text_config.use_bidirectional_attention is 'vision', not "
            f"{parsed.text_config.use_bidirectional_attention!r}; start it with --images off to serve text only"
        )
    return VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        kv_heads=vision.num_key_value_heads,
        head_dim=vision.head_dim,
        patch_size=vision.patch_size,
        pooling=vision.pooling_kernel_size,
        positions=vision.position_embedding_size,
        standardize=vision.standardize,
        rms_norm_eps=vision.rms_norm_eps,
        most_tokens=_most_tokens(folder),
        image_id=parsed.image_token_id,
        document=vision.to_json_string(use_diff=False),
    )


def _most_tokens(folder: Path) -> int:
    """What the image processor's settings say, in the file of their own or in the one of all processors."""
    path = next(path for name in IMAGE_PROCESSOR_FILES if (path := folder / name).is_file())
    raw = read_json(path)
    settings = raw.get("image_processor", raw)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: image_processor must be an object, not {settings!r}; download it again")
    return int(_number(path, settings, "max_soft_tokens", 280, minimum=1))


def _layer_config(text: Any, index: int, path: Path) -> LayerConfig:
    layer_type = text.layer_types[index]
    kinds: dict[str, Literal["sliding", "full"]] = {"sliding_attention": "sliding", "full_attention": "full"}
    if layer_type not in kinds:
        raise CheckpointError(f"{path}: layer_types[{index}] = {layer_type!r} is not supported by this engine")
    layer = text.per_layer_config[index]
    rope = text.rope_parameters[layer_type]
    partial = rope.get("partial_rotary_factor", 1.0)
    supported = {"proportional": 0 < partial <= 1, "default": partial == 1.0}
    if not supported.get(rope["rope_type"], False) or rope.get("factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: rope_parameters of {layer_type} = {rope!r} are not supported by this engine")
    if text.num_attention_heads % layer.num_key_value_heads or layer.head_dim % 2:
        raise CheckpointError(
            f"{path}: layer {index} has {text.num_attention_heads} heads of {layer.head_dim} for "
            f"{layer.num_key_value_heads} key-value heads; they must divide evenly, and the head size be even"
        )
    return LayerConfig(
        kind=kinds[layer_type],
        head_dim=layer.head_dim,
        kv_heads=layer.num_key_value_heads,
        rope_theta=float(rope["rope_theta"]),
        rope_partial=float(partial),
    )
