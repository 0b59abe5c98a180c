"""Loading: what is read, and that everything wrong with a checkpoint is an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import INDEX, WEIGHTS, load_checkpoint
from engine.config import load_generation_defaults, load_model_config
from engine.interface import CheckpointError
from engine.tensor_names import tensor_table
from tests.engine.small_models import CPU, GENERATION, random_model, save, small_config

LAYER = "model.decoder.layers.0."


@pytest.fixture
def folder(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path | str) -> None:
    load_checkpoint(folder, CPU, torch.float32, progress=False)


def refused(folder: Path | str, *parts: str) -> None:
    """Loading raises a CheckpointError that says all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value)


# what is read


def test_config_is_transformers_config(small_checkpoint: Path) -> None:
    config = load_model_config(small_checkpoint)
    assert (config.vocab_size, config.hidden_size, config.canvas_length, config.max_positions) == (160, 48, 8, 512)
    assert (config.sliding_window, config.num_heads, config.final_softcap) == (12, 4, 30.0)
    assert (config.num_experts, config.top_k_experts, config.moe_intermediate_size) == (8, 2, 24)
    assert [layer.kind for layer in config.layers] == ["sliding", "sliding", "full", "sliding", "full"]
    sliding, full = config.layers[0], config.layers[2]
    assert (sliding.head_dim, sliding.kv_heads, sliding.rope_theta, sliding.rope_partial) == (16, 2, 1e4, 1.0)
    assert (full.head_dim, full.kv_heads, full.rope_theta, full.rope_partial) == (32, 1, 1e6, 0.25)


def test_published_form_of_the_per_layer_keys(folder: Path) -> None:
    """The published config.json has global_head_dim and num_global_key_value_heads instead of per_layer_config."""

    def published(config: dict[str, Any]) -> None:
        del config["text_config"]["per_layer_config"]
        config["text_config"] |= {"global_head_dim": 32, "num_global_key_value_heads": 1}

    expected = load_model_config(folder)
    edit_json(folder / "config.json", published)
    assert load_model_config(folder) == expected


def test_stored_tensors_are_stacked_in_order(small_checkpoint: Path) -> None:
    stored = load_file(small_checkpoint / WEIGHTS)
    ours = load_checkpoint(small_checkpoint, CPU, torch.float32, progress=False)
    attention = LAYER + "self_attn."
    qkv = torch.cat([stored[f"{attention}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(ours.tensors["layers.0.qkv"], qkv)
    gate_up = torch.cat([stored[f"{LAYER}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(ours.tensors["layers.0.gate_up"], gate_up)
    full = "model.decoder.layers.2.self_attn."
    assert torch.equal(ours.tensors["layers.2.qkv"], torch.cat([stored[f"{full}{part}_proj.weight"] for part in "qk"]))
    assert torch.equal(ours.tensors["layers.0.expert_down"], stored[LAYER + "experts.down_proj"])
    commit, denoise = (ours.tensors[f"layers.0.{mode}_scalar"] for mode in ("commit", "denoise"))
    assert torch.equal(commit, stored["model.encoder.language_model.layers.0.layer_scalar"])
    assert torch.equal(denoise, stored[LAYER + "layer_scalar"]) and not torch.equal(commit, denoise)


def test_the_name_table_has_no_gaps_or_overlaps(small_checkpoint: Path) -> None:
    rows: dict[str, list[int]] = {}
    for place in tensor_table(load_model_config(small_checkpoint)).values():
        rows.setdefault(place.name, []).extend(range(place.start, place.start + place.shape[0]))
    assert all(sorted(taken) == list(range(len(taken))) for taken in rows.values())


def test_counts_and_format(small_checkpoint: Path, tmp_path: Path) -> None:
    stored = load_file(small_checkpoint / WEIGHTS)
    text = {name: tensor for name, tensor in stored.items() if "vision" not in name}
    checkpoint = load_checkpoint(small_checkpoint, CPU, torch.bfloat16, progress=False)
    assert checkpoint.format == "fp32"
    assert checkpoint.parameters == sum(tensor.numel() for tensor in text.values())
    assert checkpoint.weight_bytes == 2 * checkpoint.parameters
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.bfloat16}
    halved = save(random_model(small_config()).bfloat16(), tmp_path / "bf16")
    assert load_checkpoint(halved, CPU, torch.float32, progress=False).format == "bf16"


def test_shards_load_like_one_file(small_checkpoint: Path, tmp_path: Path) -> None:
    sharded = save(random_model(small_config()), tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = (load_checkpoint(path, CPU, torch.float32, progress=False) for path in (small_checkpoint, sharded))
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(tensor, many.tensors[name]) for name, tensor in one.tensors.items())


def test_progress_bar_counts_bytes(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_checkpoint(small_checkpoint, CPU, torch.float32, progress=True)
    assert "100%" in capsys.readouterr().err
    load(small_checkpoint)
    assert capsys.readouterr().err == ""


def test_generation_defaults(folder: Path) -> None:
    defaults = load_generation_defaults(folder)
    assert (defaults.max_denoising_steps, defaults.t_min, defaults.t_max) == (48, 0.4, 0.8)
    assert (defaults.entropy_bound, defaults.stability_threshold, defaults.confidence_threshold) == (0.1, 1, 0.005)
    assert (defaults.eos_ids, defaults.pad_id) == (frozenset({1, 106, 50}), 0)
    edit_json(folder / "generation_config.json", lambda config: config.update(t_max=0.9, eos_token_id=7))
    changed = load_generation_defaults(folder)
    assert (changed.t_max, changed.eos_ids) == (0.9, frozenset({7}))


def test_absent_generation_keys_take_transformers_defaults(folder: Path) -> None:
    expected = load_generation_defaults(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": GENERATION["eos_token_id"]}))
    assert load_generation_defaults(folder) == expected


# what is wrong with the folder


def test_no_such_folder(tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere"), "nowhere", "hub id")


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / WEIGHTS, WEIGHTS, "is a file")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("nobody/no-such-model", "nobody/no-such-model", "download", "network")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, name)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    refused(folder, name)


# what is wrong with config.json and generation_config.json


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma4"}, "gemma4"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "modelopt"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"canvas_length": 0}, "canvas_length"),
        ({"text_config": {"hidden_activation": "silu"}}, "hidden_activation"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "use_bidirectional_attention"),
        ({"text_config": {"sliding_window": 1}}, "sliding_window"),
        ({"text_config": {"final_logit_softcapping": None}}, "final_logit_softcapping"),
        ({"text_config": {"num_experts": None}}, "num_experts"),
        ({"text_config": {"top_k_experts": 99}}, "top_k_experts"),
        ({"text_config": {"moe_intermediate_size": None}}, "moe_intermediate_size"),
        ({"text_config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"text_config": {"num_attention_heads": 3}}, "3 heads"),
        ({"text_config": {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1.0}}}}, "rope"),
    ],
)
def test_config_that_cannot_be_served(folder: Path, change: dict[str, Any], named: str) -> None:
    def merge(config: dict[str, Any]) -> None:
        for key, value in change.items():
            config[key] = config[key] | value if key == "text_config" else value

    edit_json(folder / "config.json", merge)
    refused(folder, "config.json", named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eos_token_id": None}, "eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"sampler_config": {"_cls_name": "OtherConfig"}}, "OtherConfig"),
        ({"max_denoising_steps": 0}, "max_denoising_steps"),
        ({"max_denoising_steps": 4.5}, "max_denoising_steps"),
        ({"t_min": "cold"}, "t_min"),
        ({"t_min": 0.9}, "t_max"),
        ({"stability_threshold": -1}, "stability_threshold"),
    ],
)
def test_generation_config_that_cannot_be_served(folder: Path, change: dict[str, Any], named: str) -> None:
    edit_json(folder / "generation_config.json", lambda config: config.update(change))
    refused(folder, "generation_config.json", named)


# what is wrong with the tensors


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(LAYER + "router.scale"))
    refused(folder, LAYER + "router.scale", "lacks")


def test_missing_commit_scalar(folder: Path) -> None:
    name = "model.encoder.language_model.layers.3.layer_scalar"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, name)


def test_unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 2)}))
    refused(folder, "lm_head.weight", "does not have")


def test_values_projection_of_a_full_layer_is_unexpected(folder: Path) -> None:
    name = "model.decoder.layers.2.self_attn.v_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(32, 48)}))
    refused(folder, name)


def test_vision_tensors_are_skipped_and_may_be_absent(folder: Path) -> None:
    assert any(name.startswith("model.encoder.vision_tower.") for name in load_file(folder / WEIGHTS))

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "vision" in name]:
            del tensors[name]

    edit_tensors(folder, drop)
    load(folder)


def test_mis_shaped_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({LAYER + "mlp.up_proj.weight": torch.zeros(41, 48)}))
    refused(folder, LAYER + "mlp.up_proj.weight", "[41, 48]", "[40, 48]")


def test_transposed_tensor_of_the_same_size(folder: Path) -> None:
    name = LAYER + "mlp.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(folder, name)


def test_unknown_storage_type(folder: Path) -> None:
    name = LAYER + "router.proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, name, "I8")


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, WEIGHTS, "download it again")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return save(random_model(small_config()), tmp_path / "shards", max_shard_size="100KB")


def test_missing_shard(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    refused(shards, lost.name, "missing")


def test_broken_index(shards: Path) -> None:
    edit_json(shards / INDEX, lambda index: index.update(weight_map=["a"]))
    refused(shards, INDEX, "weight_map")


def test_tensor_stored_twice(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refused(shards, name, "twice")
