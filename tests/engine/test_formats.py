"""Quantised checkpoints: each layout against the library that defines it, counts and bytes of the published ones, and
that everything wrong with one is an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from engine.checkpoint import ITEM_BYTES, WEIGHTS, Checkpoint, load_checkpoint, plan_checkpoint
from engine.config import load_model_config, published_config
from engine.formats import FLOAT_FP8, MODELOPT_NVFP4, PACKED_INT4, Choice, Scheme, choose, layout, modules
from engine.interface import CheckpointError
from engine.kernels.weights import Fp8Weight, Int4Weight, Nvfp4Weight, dense, shape
from engine.quantization_config import described, load_quantization
from engine.tensor_names import tensor_table
from tests.engine.quantised_models import PUBLISHED, set_quantization, write
from tests.engine.small_models import CPU, fresh_slots, load_model, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.decoder.layers.0."
KINDS = sorted(PUBLISHED)
WEIGHT_CLASSES = {"fp8": Fp8Weight, "nvfp4": Nvfp4Weight, "int4": Int4Weight}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Folder and read-back matrices of a kind, written once."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(kind: str) -> tuple[Path, dict[str, Tensor]]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("quantised")
            made[kind] = folder, write(folder, kind)
        return made[kind]

    return get


def load(folder: Path, device: torch.device = CPU) -> Checkpoint:
    return load_checkpoint(folder, device, torch.float32, progress=False)


# against the libraries


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_what_the_library_reads(
    kind: str, checkpoints: Callable[[str], tuple[Path, dict[str, Tensor]]], device: torch.device
) -> None:
    folder, expected = checkpoints(kind)
    loaded = load(folder, device)
    assert loaded.format == kind.split()[-1]
    seen = set()
    for stored, place in tensor_table(loaded.config).items():
        for module in modules(stored, place):
            if module.name not in expected:
                continue
            weight = loaded.tensors[place.name]
            assert isinstance(weight, WEIGHT_CLASSES[loaded.format])
            matrix = dense(weight, torch.float32).cpu()
            matrix = matrix if module.expert is None else matrix[module.expert]
            ours = matrix[module.start : module.start + module.rows]
            # a global scale to divide by is multiplied as its reciprocal: one rounding of float32 more
            torch.testing.assert_close(ours, expected[module.name].float(), rtol=3e-7, atol=0)
            seen.add(module.name)
    assert seen == expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_stays_plain_and_counts_are_right(
    kind: str, checkpoints: Callable[[str], tuple[Path, dict[str, Tensor]]]
) -> None:
    loaded = load(checkpoints(kind)[0])
    plain = [name for name, weight in loaded.tensors.items() if isinstance(weight, Tensor)]
    assert {"embedding", "layers.0.router", "self_conditioning.gate_up", "layers.0.q_norm"} <= set(plain)
    sizes = {name: shape(weight) for name, weight in loaded.tensors.items()}
    assert loaded.parameters == sum(prod(place.shape) for place in tensor_table(loaded.config).values())
    bits = 0.0  # 4.5 a number: 4, and the share of a scale of 8 bit in 16 or of 16 bit in 32
    for name, size in sizes.items():
        if name in plain:
            bits += 32 * prod(size)
        else:
            bits += prod(size) * {"fp8": 8, "nvfp4": 4.5, "int4": 4.5}[loaded.format]
            bits += 0 if loaded.format == "int4" else 32 * prod(size[:-1])
    assert 8 * loaded.weight_bytes == bits


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_runs_on_it_as_on_the_dense_matrices(
    kind: str, checkpoints: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, expected = checkpoints(kind)
    plain = Path(shutil.copytree(folder, tmp_path / "dense"))
    stored = load_file(plain / WEIGHTS)
    for name in [name for name in stored if name.rpartition(".")[0] in expected]:
        del stored[name]
    for fused, place in tensor_table(load_model_config(folder)).items():
        parts = [expected[module.name].float() for module in modules(fused, place) if module.name in expected]
        if parts:
            stored[fused] = torch.cat(parts).reshape(place.shape)
    save_file(stored, plain / WEIGHTS)
    set_quantization(plain, None)
    canvas = random_ids(8, 160, seed=1)[None]
    models = [load_model(each) for each in (folder, plain)]
    logits = [model.denoise(canvas, None, fresh_slots(model, 1)) for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


# the published checkpoints, by their shapes

VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "global_head_dim": 72,
    "patch_size": 16,
    "standardize": True,
}
# Tensors and bytes of google's, NVIDIA's, Red Hat's and cyankiwi's checkpoints as published.
COUNTS: list[tuple[Scheme | None, tuple[str, ...], int, int]] = [
    (None, (), 1_047, 51_647_562_456),
    (MODELOPT_NVFP4, (".experts.",), 47_067, 18_818_050_776),
    (FLOAT_FP8, (".experts.", ".mlp.", ".self_attn."), 24_232, 27_197_665_496),
    (PACKED_INT4, (".experts.", ".self_attn."), 35_777, 17_222_261_256),
]


@pytest.mark.parametrize(("scheme", "quantised", "count", "size"), COUNTS, ids=lambda value: str(value)[:24])
def test_counts_and_bytes_of_the_published_checkpoints(
    scheme: Scheme | None, quantised: tuple[str, ...], count: int, size: int
) -> None:
    def scheme_of(module: str) -> Scheme | None:
        return scheme if any(part in module for part in quantised) else None

    pieces = layout(published_config(), scheme_of).pieces.values()
    with torch.device("meta"):
        vision = Gemma4VisionModel(Gemma4VisionConfig(**VISION)).state_dict().values()
    assert len(pieces) + len(vision) + 1 == count  # and the projection into the text model
    stored = sum(
        prod(piece.shape) * ITEM_BYTES["BF16" if "BF16" in piece.kinds else piece.kinds[0]] for piece in pieces
    )
    assert stored + 2 * (sum(tensor.numel() for tensor in vision) + 2816 * 1152) == size


def test_shapes_of_one_published_expert() -> None:
    pieces = layout(published_config(), lambda name: MODELOPT_NVFP4 if ".experts." in name else None).pieces
    expert = "model.decoder.layers.29.experts.127."
    assert pieces[f"{expert}gate_proj.weight"].shape == pieces[f"{expert}up_proj.weight"].shape == (704, 1408)
    assert pieces[f"{expert}down_proj.weight"].shape == (2816, 352)
    assert pieces[f"{expert}gate_proj.weight_scale"].shape == (704, 176)
    assert pieces[f"{expert}down_proj.weight_scale"].shape == (2816, 44)
    assert pieces[f"{expert}down_proj.weight_scale_2"].shape == pieces[f"{expert}up_proj.input_scale"].shape == ()


# what is wrong with quantization_config


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}


def group(**changes: object) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | changes
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [],
    }


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ("fp8", ["must be an object"]),
        ({"quant_method": "gptq", "bits": 4}, ["'gptq'", "known are", "modelopt NVFP4", "pack-quantized"]),
        ({"bits": 4}, ["quant_method None", "known are"]),
        (MODELOPT | {"quant_algo": "FP8"}, ["'FP8'", "known are"]),
        (MODELOPT | {"quant_algo": "MIXED_PRECISION"}, ["'MIXED_PRECISION'"]),
        (MODELOPT | {"group_size": 32}, ["group_size 32"]),
        (MODELOPT | {"config_groups": {"g": {"weights": {"group_size": 128}}}}, ["group_size 128"]),
        (MODELOPT | {"ignore": "lm_head"}, ["ignore", "list"]),
        (group() | {"format": "mxfp4-pack-quantized"}, ["'mxfp4-pack-quantized'", "known are"]),
        (group() | {"format": "mixed-precision"}, ["'mixed-precision'"]),
        (group(group_size=128), ["group_size 128", "known are"]),
        (group(symmetric=False), ["symmetric False"]),
        (group(num_bits=8), ["num_bits 8"]),
        (group(type="float"), ["type 'float'"]),
        (group(strategy="channel"), ["strategy 'channel'"]),
        (group(actorder="group"), ["actorder 'group'"]),
        (group() | {"format": "nvfp4-pack-quantized"}, ["nvfp4-pack-quantized with type 'int'"]),
        (group() | {"quantization_status": "frozen"}, ["'frozen'"]),
        (group() | {"transform_config": {"config_groups": {}}}, ["transform_config"]),
        (group() | {"sparsity_config": {"format": "sparse-bitmask"}}, ["sparsity_config"]),
        (group() | {"config_groups": {}}, ["config_groups"]),
        (group() | {"config_groups": {"g": {"targets": ["Linear"]}}}, ["without quantised weights"]),
        (group() | {"ignore": ["re:("]}, ["expression"]),
        (
            group() | {"ignore": ["re:.*router", "re:.*self_attn.q_proj"]},
            ["q_proj", "k_proj", "mixture"],
        ),
        (group() | {"ignore": ["re:.*router", "re:.*experts.1.up_proj"]}, ["experts.1.up_proj", "mixture"]),
        (group(), ["router"]),
    ],
)
def test_a_scheme_that_is_not_known(
    small_checkpoint: Path, tmp_path: Path, quantization: Any, named: list[str]
) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))
    set_quantization(folder, quantization)
    refused(folder, "quantization_config", *named)


def test_static_activation_scales_of_fp8_are_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))
    quantization = group(num_bits=8, type="float", strategy="channel", group_size=None) | {"format": "float-quantized"}
    quantization["config_groups"]["group_0"]["input_activations"] = {"dynamic": False}
    set_quantization(folder, quantization)
    refused(folder, "static activation scales")


@pytest.mark.parametrize(
    ("inputs", "declared"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, True),  # FP8-dynamic as published
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}, False),
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, False),
        (None, False),
    ],
)
def test_whether_inputs_are_declared_8_bit(
    small_checkpoint: Path, tmp_path: Path, inputs: dict[str, Any] | None, declared: bool
) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))
    quantization = group(num_bits=8, type="float", strategy="channel", group_size=None) | {"format": "float-quantized"}
    quantization["config_groups"]["group_0"]["input_activations"] = inputs
    quantization["ignore"] = ["re:.*router.*"]
    set_quantization(folder, quantization)
    read = load_quantization(folder)
    assert read is not None and read.eight_bit is declared
    assert plan_checkpoint(folder).eight_bit is declared


def test_what_is_quantised_to_fp8_declares_it_too(small_checkpoint: Path, tmp_path: Path) -> None:
    for choice, declared in ((Choice("fp8", "fp8"), True), (Choice("nvfp4", "fp8"), True), (Choice("nvfp4"), False)):
        assert choice.eight_bit is declared
        folder = Path(shutil.copytree(small_checkpoint, tmp_path / f"{choice.experts}-{choice.dense}"))
        set_quantization(folder, described(choice))
        read = load_quantization(folder)
        assert read is not None and read.eight_bit is declared  # what is written says the same


def test_columns_that_no_group_divides(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))  # 48 columns
    set_quantization(folder, group() | {"ignore": ["re:.*router", "re:.*self_"]})
    refused(folder, "48 columns", "32")


def test_names_expressions_and_groups_of_compressed_tensors(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))
    quantization = group() | {"ignore": ["a.b", "re:.*router"]}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    quantization["format"] = "mixed-precision"
    quantization["config_groups"] = {
        "dense": {"targets": ["re:.*self_attn"], "format": "float-quantized", "weights": fp8},
        "rest": group()["config_groups"]["group_0"] | {"format": "pack-quantized"},
    }
    set_quantization(folder, quantization)
    read = load_quantization(folder)
    assert read is not None
    assert read.scheme_of("x.self_attn.q_proj") is FLOAT_FP8
    assert read.scheme_of("x.mlp.up_proj") is PACKED_INT4
    assert read.scheme_of("a.b") is read.scheme_of("x.router.proj") is None
    assert read.scheme_of("a.b.c") is PACKED_INT4


def test_globs_of_modelopt(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))
    set_quantization(folder, MODELOPT | {"ignore": ["lm_head", "*mlp*", "a.router"]})
    read = load_quantization(folder)
    assert read is not None
    assert read.scheme_of("a.experts.0.up_proj") is MODELOPT_NVFP4
    assert read.scheme_of("a.mlp.up_proj") is read.scheme_of("a.router.proj") is read.scheme_of("lm_head") is None


# tensors that contradict it


@pytest.fixture
def nvfp4(checkpoints: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoints("compressed-tensors nvfp4")[0], tmp_path / "copy"))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_ignored(folder: Path, change: Callable[[list[str]], object]) -> None:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(quantization["ignore"])
    set_quantization(folder, quantization)


def test_layers_said_to_be_quantised_that_are_not(nvfp4: Path) -> None:
    edit_ignored(nvfp4, lambda ignored: [ignored.remove(name) for name in list(ignored) if ".self_attn." in name])
    refused(nvfp4, "self_attn.k_proj.weight_packed", "nvfp4-pack-quantized", "contradicts the tensors")


def test_layers_quantised_that_are_said_not_to_be(nvfp4: Path) -> None:
    edit_ignored(nvfp4, lambda ignored: ignored.append("re:.*mlp"))
    refused(nvfp4, "lacks", LAYER + "mlp.down_proj.weight")


def test_no_quantization_config_beside_quantised_tensors(nvfp4: Path) -> None:
    set_quantization(nvfp4, None)
    refused(nvfp4, "lacks", "experts")


def test_another_scheme_than_the_tensors(nvfp4: Path) -> None:
    set_quantization(nvfp4, MODELOPT | {"ignore": ["*self_*", "*router*", "*.mlp.*"]})
    refused(nvfp4, "weight", "modelopt NVFP4", "contradicts the tensors")


def test_a_missing_scale(nvfp4: Path) -> None:
    name = LAYER + "experts.3.up_proj.weight_global_scale"
    edit_tensors(nvfp4, lambda tensors: tensors.pop(name))
    refused(nvfp4, "lacks", name)


def test_an_expert_too_many(nvfp4: Path) -> None:
    name = LAYER + "experts.4.up_proj.weight_scale"
    edit_tensors(nvfp4, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refused(nvfp4, name, "does not have", "leaves")


def test_a_zero_point(nvfp4: Path) -> None:
    name = LAYER + "experts.0.up_proj.weight_zero_point"
    edit_tensors(nvfp4, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refused(nvfp4, name, "does not have")


def test_a_mis_shaped_scale(nvfp4: Path) -> None:
    name = LAYER + "experts.0.up_proj.weight_scale"
    edit_tensors(nvfp4, lambda tensors: tensors.update({name: tensors[name].view(torch.uint8)[:, :2].clone()}))
    refused(nvfp4, name, "[32, 2]", "[32, 4]")


def test_scales_of_another_type(nvfp4: Path) -> None:
    name = LAYER + "experts.0.up_proj.weight_scale"
    edit_tensors(nvfp4, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(nvfp4, name, "F32", "F8_E4M3", "nvfp4-pack-quantized")


def test_input_scales_may_be_absent(nvfp4: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("input_global_scale")]:
            del tensors[name]

    edit_tensors(nvfp4, drop)
    load(nvfp4)


def test_quantised_already_and_quantize(nvfp4: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantised already.*--quantize"):
        load_checkpoint(nvfp4, CPU, torch.float32, progress=False, choice=choose("fp8", None))
