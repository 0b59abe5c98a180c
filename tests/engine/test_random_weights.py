"""Random weights: stored as the loader stores them, of a trained model's magnitudes, and good for serving."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.engine import DiffusionEngine
from engine.formats import layout
from engine.interface import EngineError, EngineOptions, Finished, GenerationRequest, Sampling
from engine.kernels.reference import REFERENCE, route
from engine.kernels.weights import dense, plain, shape
from engine.kv_cache import KVPool
from engine.model.gemma4 import DiffusionGemma
from engine.quantize import parts_of
from engine.random_weights import MATRICES, plan_random, random_checkpoint, random_weight
from engine.shapes import FORMAT_CHOICES, format_choice, tiny_config
from tests.engine.quantised_models import SIZES
from tests.engine.small_models import CPU, random_model, save, small_config

FORMATS = tuple(FORMAT_CHOICES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config(**SIZES)).bfloat16(), tmp_path_factory.mktemp("plain"))


def made(form: str, seed: int = 0) -> Checkpoint:
    return random_checkpoint(plan_random("tiny", form), CPU, torch.float32, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_storage_is_the_loaders(folder: Path, form: str, dtype: torch.dtype) -> None:
    choice = format_choice(form)
    loaded = load_checkpoint(folder, CPU, dtype, progress=False, choice=choice)
    specs = layout(loaded.config, choice=choice).weights
    assert specs.keys() == loaded.tensors.keys()
    for name, expected in loaded.tensors.items():
        weight = random_weight(name, specs[name], loaded.config, CPU, dtype)
        assert type(weight) is type(expected), name
        found = {field: (part.dtype, part.shape, part.stride()) for field, part in parts_of(weight).items()}
        assert found == {
            field: (part.dtype, part.shape, part.stride()) for field, part in parts_of(expected).items()
        }, name


@pytest.mark.parametrize("form", FORMATS)
def test_checkpoint_says_what_it_is(form: str) -> None:
    checkpoint = made(form)
    assert checkpoint.format == (form.partition("+")[0] if form != "bf16" else "fp32")
    assert checkpoint.parameters == sum(prod(shape(weight)) for weight in checkpoint.tensors.values())
    assert checkpoint.weight_bytes == plan_random("tiny", form).layout.weight_bytes(4)
    assert (checkpoint.device, checkpoint.dtype) == (CPU, torch.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_every_matrix_keeps_a_rows_length(form: str) -> None:
    for name, weight in made(form).tensors.items():
        if name.rpartition(".")[2] not in MATRICES:
            continue
        matrix = dense(weight, torch.float32)
        expected = 1.0 if name.endswith(".router") else matrix.shape[-1] ** -0.5
        noise = 5 * matrix.numel() ** -0.5
        assert matrix.isfinite().all(), name
        assert matrix.std().item() == pytest.approx(expected, rel=max(0.05, noise)), name
        assert abs(matrix.mean().item()) < noise * expected, name


def test_seed_and_name_decide_the_values() -> None:
    first, again, other = made("nvfp4"), made("nvfp4"), made("nvfp4", seed=1)
    for name in ("embedding", "layers.0.expert_down", "layers.1.qkv"):
        a, b, c = (dense(each.tensors[name], torch.float32) for each in (first, again, other))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    layers = [dense(first.tensors[f"layers.{index}.expert_down"], torch.float32) for index in range(2)]
    assert not torch.equal(*layers)


@pytest.mark.parametrize("form", FORMATS)
def test_activations_are_of_a_real_models_size(form: str) -> None:
    checkpoint = made(form)
    config = checkpoint.config
    used = []

    def watched(*inputs: object) -> object:
        weights, chosen = route(*inputs)  # type: ignore[arg-type]
        used.append(len(chosen.unique()))
        return weights, chosen

    pool = KVPool(config, 1, 256, CPU, torch.float32)
    model = DiffusionGemma(config, checkpoint.tensors, replace(REFERENCE, route=watched), pool)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    model.commit(torch.randint(config.vocab_size, (100,), generator=generator), pool.slots[0])
    logits = model.denoise(torch.randint(config.vocab_size, (1, 16), generator=generator), None, [pool.slots[0]])
    assert logits.isfinite().all()
    assert 0.7 < logits.std().item() < 1.4
    assert min(used[-len(config.layers) :]) >= config.num_experts - 1


def test_embedding_is_there_once() -> None:
    checkpoint = made("bf16")
    assert plain(checkpoint.tensors["embedding"]).shape == (tiny_config().vocab_size, tiny_config().hidden_size)
    assert not [name for name in checkpoint.tensors if "head" in name]


def test_an_engine_of_random_weights_serves() -> None:
    options = EngineOptions(model="tiny", device="cpu", context_length=128)
    engine = DiffusionEngine.from_random("tiny", "int4", options)
    assert (engine.info.format, engine.info.model_path, engine.info.context_length) == ("int4", "tiny", 128)
    engine.submit(GenerationRequest(id="a", prompt_ids=(2, 3, 4), max_tokens=16, sampling=Sampling(seed=1)))
    events = [event for _ in range(200) if engine.has_work for event in engine.step()]
    (finished,) = events  # noise never converges, so no canvas is delivered
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.denoise_steps) == ("length", 96)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(EngineError, match=r"unknown shape 'huge'; choose 26b-a4b or tiny"):
        plan_random("huge", "bf16")
    with pytest.raises(
        EngineError, match=r"unknown format 'fp3'; choose bf16, fp8, nvfp4, nvfp4\+fp8, int4, int4\+fp8"
    ):
        plan_random("tiny", "fp3")
