"""Small quantised checkpoints with the published tensor names, packed by the libraries that define the formats.

`write` turns a small random checkpoint into one of the published layouts and returns the matrices that the library
itself reads back from what it wrote.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import WEIGHTS
from tests.engine.small_models import random_model, save, small_config

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4}
Packed = tuple[dict[str, Tensor], Tensor]  # the stored tensors by suffix, and the matrix float32 they stand for


@dataclass(frozen=True)
class Published:
    """One published layout: which modules are quantised, the library's packing, what config.json says."""

    quantised: tuple[str, ...]  # parts of module names
    packer: Callable[[], Callable[[Tensor], Packed]]
    config: Callable[[list[str]], dict[str, Any]]  # of the names of the linear layers left as they are


def linears(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module name -> matrix [out, in] of every linear layer of the decoder, experts one by one."""
    found = {}
    for name, tensor in stored.items():
        if not name.startswith("model.decoder."):
            continue
        if name.endswith("proj.weight"):
            found[name.removesuffix(".weight")] = tensor
        elif name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                found[name.replace("gate_up_proj", f"{expert}.gate_proj")] = gate
                found[name.replace("gate_up_proj", f"{expert}.up_proj")] = up
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                found[name.replace("down_proj", f"{expert}.down_proj")] = matrix
    return found


def write(folder: Path, kind: str) -> dict[str, Tensor]:
    """Write a checkpoint in the layout `kind`, a key of `PUBLISHED`. Returns module name -> matrix float32."""
    published = PUBLISHED[kind]
    save(random_model(small_config(**SIZES)).bfloat16(), folder)
    stored = load_file(folder / WEIGHTS)
    pack = published.packer()
    read_back: dict[str, Tensor] = {}
    left = []
    for module, matrix in linears(stored).items():
        if any(part in module for part in published.quantised):
            stored.pop(f"{module}.weight", None)
            parts, read_back[module] = pack(matrix.contiguous())
            stored |= {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in parts.items()}
        else:
            left.append(module)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        del stored[name]
    save_file(stored, folder / WEIGHTS)
    set_quantization(folder, published.config(left))
    return read_back


def set_quantization(folder: Path, quantization: object) -> None:
    """Put `quantization` into config.json as quantization_config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def compressed_tensors_config(preset: str, form: str, **weights: object) -> Callable[[list[str]], dict[str, Any]]:
    def config(left: list[str]) -> dict[str, Any]:
        library = pytest.importorskip("compressed_tensors.quantization")
        scheme = library.preset_name_to_scheme(preset, ["Linear"])
        scheme.weights = scheme.weights.model_copy(update=weights)
        # llm-compressor lists the encoder's copies of the shared layers and the vision tower's layers as well
        encoder = [name.replace("model.decoder.", "model.encoder.language_model.") for name in left]
        ignore = [*left, *encoder, "model.encoder.vision_tower.patch_embedder.input_proj", "lm_head"]
        made = library.QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=ignore
        )
        return json.loads(made.model_dump_json())

    return config


def modelopt_config(left: list[str]) -> dict[str, Any]:
    """As modelopt's exporter makes it; what is left out is named by globs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modelopt scripts functions with torch.jit
        convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    globs = ["lm_head", "model.encoder.embed_vision*", "*mlp*", "*router*", "*self_attn*", "*self_conditioning*"]
    exported = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": [*globs, "*vision_tower*"]},
    }
    return {**convert.convert_hf_quant_config_format(exported), "quant_method": "modelopt"}


def modelopt_packer() -> Callable[[Tensor], Packed]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor

    def pack(matrix: Tensor) -> Packed:
        quantised, scale, scale_2 = library.quantize(matrix, 16)
        read = quantised.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        parts = {
            "weight": quantised._quantized_data,
            "weight_scale": scale,
            "weight_scale_2": scale_2,
            "input_scale": torch.tensor(0.01),
        }
        return parts, read

    return pack


def compressed_tensors_packer(preset: str, form: str, **weights: object) -> Callable[[], Callable[[Tensor], Packed]]:
    def packer() -> Callable[[Tensor], Packed]:
        library = pytest.importorskip("compressed_tensors.quantization")
        compressors = pytest.importorskip("compressed_tensors.compressors.base")
        forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
        qparams = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
        scheme = library.preset_name_to_scheme(preset, ["Linear"])
        scheme.weights = args = scheme.weights.model_copy(update=weights)
        compressor = compressors.BaseCompressor.get_value_from_registry(form)

        def pack(matrix: Tensor) -> Packed:
            given = {"weight": matrix}
            if preset.startswith("NVFP4"):
                given["weight_global_scale"] = qparams.generate_gparam(matrix.amin(), matrix.amax())
            size = args.group_size or matrix.shape[-1]
            groups = matrix.unflatten(-1, (-1, size))
            given["weight_scale"], _ = qparams.calculate_qparams(
                groups.amin(-1), groups.amax(-1), args, given.get("weight_global_scale")
            )
            parts = compressor.compress(given, scheme)
            exact = parts | {"weight_scale": parts["weight_scale"].float()}  # the library works in the scale's dtype
            if form == "nvfp4-pack-quantized":
                fp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
                codes = fp4.unpack_fp4_from_uint8(parts["weight_packed"], *matrix.shape, dtype=torch.float32)
                read = forward.dequantize(
                    x_q=codes,
                    scale=exact["weight_scale"],
                    args=args,
                    global_scale=parts["weight_global_scale"],
                    dtype=torch.float32,
                )
                parts["input_global_scale"] = torch.ones(1)
            else:
                read = compressor.decompress(exact, scheme)["weight"]
            return parts, read

        return pack

    return packer


PUBLISHED = {
    "modelopt nvfp4": Published((".experts.",), modelopt_packer, modelopt_config),
    "compressed-tensors nvfp4": Published(
        (".experts.", ".mlp."),
        compressed_tensors_packer("NVFP4", "nvfp4-pack-quantized"),
        compressed_tensors_config("NVFP4", "nvfp4-pack-quantized"),
    ),
    "compressed-tensors fp8": Published(
        (".experts.", ".mlp.", ".self_attn."),
        compressed_tensors_packer("FP8_DYNAMIC", "float-quantized"),
        compressed_tensors_config("FP8_DYNAMIC", "float-quantized"),
    ),
    "compressed-tensors int4": Published(
        (".experts.", ".self_attn."),
        compressed_tensors_packer("W4A16", "pack-quantized", group_size=32),
        compressed_tensors_config("W4A16", "pack-quantized", group_size=32),
    ),
}
