"""A checkpoint folder (or hub id) becomes named tensors on the device.

The name table below is the one place that knows how the published names map onto ours: projections of one input are
stacked into one matrix at load time. Tensors are copied one by one from the mapped file into their final place, so
nothing is held twice. Knows no layer's maths and builds no model.

Invariant: a folder loads completely or not at all. Every missing, unexpected or mis-shaped tensor is a
CheckpointError that names it; only the vision tower's are skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.config import (
    GenerationDefaults,
    LayerConfig,
    ModelConfig,
    load_generation_defaults,
    load_model_config,
    read_json,
)
from engine.interface import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")  # not served yet
FORMATS = {"BF16": "bf16", "F32": "fp32"}
ITEM_BYTES = {"BF16": 2, "F32": 4}
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint. `tensors` has our names, see `tensor_table`; tied weights are there once."""

    path: Path
    config: ModelConfig
    generation: GenerationDefaults
    tensors: Mapping[str, Tensor]
    format: str  # how most of the weights are stored: "bf16" or "fp32"

    @property
    def parameters(self) -> int:
        """Number of weights of the text model."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: rows `start` to `start + shape[0]` of our tensor `name`."""

    name: str
    start: int
    shape: tuple[int, ...]


def load_checkpoint(
    path_or_hub_id: str | Path, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> Checkpoint:
    """Load a folder, or a hub id such as "google/diffusiongemma-26B-A4B-it", onto `device` as `dtype`.

    Raises CheckpointError, which says what is wrong with which file, key or tensor and what to do.
    """
    folder = resolve_folder(path_or_hub_id)
    config = load_model_config(folder)
    generation = load_generation_defaults(folder)
    table = tensor_table(config)
    with ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        _check_tensors(stored, table, folder)
        tensors = _read(stored, table, device, dtype, progress)
        kinds: Counter[str] = Counter()
        for name in table:
            kinds[stored[name].kind] += stored[name].numel
    return Checkpoint(
        path=folder,
        config=config,
        generation=generation,
        tensors=tensors,
        format=FORMATS[kinds.most_common(1)[0][0]],
    )


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded first. Raises CheckpointError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and {WEIGHTS}")
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {name}; give a checkpoint folder or a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except (HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor could it be downloaded: {error}. Check the name, the network and, for "
            "a gated model, that you are logged in; or download it elsewhere and give the folder"
        ) from error


def tensor_table(config: ModelConfig) -> dict[str, Place]:
    """Stored name -> place in our layout, for every tensor of the text model.

    Ours: embedding, norm, self_conditioning.{pre_norm, gate_up, down} and, under layers.N.:
    input_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm, pre_experts_norm, post_experts_norm, post_ffn_norm,
    qkv (q, k and, on sliding layers, v), out, q_norm, k_norm, gate_up, down, router, router_scale, expert_scale,
    expert_gate_up, expert_down, commit_scalar, denoise_scalar.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    table = {
        "model.decoder.embed_tokens.weight": Place("embedding", 0, (config.vocab_size, hidden)),
        "model.decoder.norm.weight": Place("norm", 0, (hidden,)),
        "model.decoder.self_conditioning.pre_norm.weight": Place("self_conditioning.pre_norm", 0, (hidden,)),
    }
    table.update(_mlp_table("model.decoder.self_conditioning.", "self_conditioning.", hidden, width))
    for index, layer in enumerate(config.layers):
        source, ours = f"model.decoder.layers.{index}.", f"layers.{index}."
        table[f"model.encoder.language_model.layers.{index}.layer_scalar"] = Place(ours + "commit_scalar", 0, (1,))
        table[source + "layer_scalar"] = Place(ours + "denoise_scalar", 0, (1,))
        for stored, name in NORMS.items():
            table[f"{source}{stored}.weight"] = Place(ours + name, 0, (hidden,))
        table.update(_attention_table(source + "self_attn.", ours, config, layer))
        table.update(_mlp_table(source + "mlp.", ours, hidden, width))
        table.update(_expert_table(source, ours, config))
    return table


NORMS = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm",
    "post_feedforward_layernorm_1": "post_mlp_norm",
    "pre_feedforward_layernorm_2": "pre_experts_norm",
    "post_feedforward_layernorm_2": "post_experts_norm",
    "post_feedforward_layernorm": "post_ffn_norm",
}


def _attention_table(source: str, ours: str, config: ModelConfig, layer: LayerConfig) -> dict[str, Place]:
    query_rows, kv_rows = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    table = {
        source + "q_proj.weight": Place(ours + "qkv", 0, (query_rows, config.hidden_size)),
        source + "k_proj.weight": Place(ours + "qkv", query_rows, (kv_rows, config.hidden_size)),
        source + "o_proj.weight": Place(ours + "out", 0, (config.hidden_size, query_rows)),
        source + "q_norm.weight": Place(ours + "q_norm", 0, (layer.head_dim,)),
        source + "k_norm.weight": Place(ours + "k_norm", 0, (layer.head_dim,)),
    }
    if layer.kind == "sliding":  # full layers have none: their values are the raw keys
        table[source + "v_proj.weight"] = Place(ours + "qkv", query_rows + kv_rows, (kv_rows, config.hidden_size))
    return table


def _mlp_table(source: str, ours: str, hidden: int, width: int) -> dict[str, Place]:
    return {
        source + "gate_proj.weight": Place(ours + "gate_up", 0, (width, hidden)),
        source + "up_proj.weight": Place(ours + "gate_up", width, (width, hidden)),
        source + "down_proj.weight": Place(ours + "down", 0, (hidden, width)),
    }


def _expert_table(source: str, ours: str, config: ModelConfig) -> dict[str, Place]:
    count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return {
        source + "router.proj.weight": Place(ours + "router", 0, (count, hidden)),
        source + "router.scale": Place(ours + "router_scale", 0, (hidden,)),
        source + "router.per_expert_scale": Place(ours + "expert_scale", 0, (count,)),
        source + "experts.gate_up_proj": Place(ours + "expert_gate_up", 0, (count, 2 * width, hidden)),
        source + "experts.down_proj": Place(ours + "expert_down", 0, (count, hidden, width)),
    }


@dataclass(frozen=True)
class _Stored:
    """One tensor of an open safetensors file."""

    file: Any  # safe_open, untyped
    path: Path
    shape: tuple[int, ...]
    kind: str  # safetensors' dtype name

    @property
    def numel(self) -> int:
        return prod(self.shape)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor stored in the folder, by name. The files stay open as long as `stack`."""
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, though {INDEX} lists it; download it again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not fully downloaded ({error}); download it again") from error
        for name in file.keys():
            if name in stored:
                raise CheckpointError(f"tensor {name} is stored twice, in {stored[name].path} and {path}")
            entry = file.get_slice(name)
            stored[name] = _Stored(file, path, tuple(entry.get_shape()), entry.get_dtype())
    return stored


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).exists():
        yield folder / WEIGHTS
        return
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it is not a complete checkpoint")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to files; download it again")
    for shard in sorted(set(shards.values())):
        yield folder / shard


def _check_tensors(stored: dict[str, _Stored], table: dict[str, Place], folder: Path) -> None:
    """Raise CheckpointError unless the stored tensors are exactly those of the table, plus the vision tower's."""
    if missing := sorted(table.keys() - stored.keys()):
        raise CheckpointError(f"{folder} lacks {_names(missing)}; the download is incomplete or for another model")
    surplus = sorted(name for name in stored.keys() - table.keys() if not name.startswith(VISION))
    if surplus:
        raise CheckpointError(
            f"{folder} holds {_names(surplus)}, which this model does not have; config.json does not match the "
            "weights, or they are in a format that is not supported"
        )
    for name, place in table.items():
        tensor = stored[name]
        if tensor.shape != place.shape:
            raise CheckpointError(
                f"tensor {name} in {tensor.path} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(place.shape)}; they belong to different models"
            )
        if tensor.kind not in FORMATS:
            raise CheckpointError(
                f"tensor {name} in {tensor.path} is stored as {tensor.kind}; only {' and '.join(FORMATS)} are supported"
            )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {', '.join(names[:3])}{more}"


def _read(
    stored: dict[str, _Stored], table: dict[str, Place], device: torch.device, dtype: torch.dtype, progress: bool
) -> dict[str, Tensor]:
    """Allocate our tensors on the device and copy every stored one into its place."""
    rows: Counter[str] = Counter()
    for place in table.values():
        rows[place.name] += place.shape[0]
    tensors: dict[str, Tensor] = {}
    total = sum(stored[name].numel * ITEM_BYTES[stored[name].kind] for name in table)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="loading", disable=not progress) as bar:
        for name, place in sorted(table.items(), key=lambda item: (str(stored[item[0]].path), item[0])):
            if place.name not in tensors:
                shape = (rows[place.name], *place.shape[1:])
                tensors[place.name] = torch.empty(shape, dtype=dtype, device=device)
            source = stored[name]
            tensors[place.name][place.start : place.start + place.shape[0]].copy_(source.file.get_tensor(name))
            bar.update(source.numel * ITEM_BYTES[source.kind])
    return tensors
