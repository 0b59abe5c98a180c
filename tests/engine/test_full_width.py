"""The model as wide as the published one, two layers deep, against transformers in bfloat16.

On a GPU with all 128 experts, the Triton ops as start-up chooses them, and a prefix beyond the window; on a CPU the
reference ops with 10 experts and a shorter window, which is what half a minute allows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from engine.assemble import assemble
from engine.checkpoint import load_checkpoint
from engine.formats import Choice, choose
from engine.kv_cache import KVPool
from engine.model.gemma4 import DiffusionGemma
from tests.engine.small_models import fresh_slots, random_ids, save, small_config
from tests.engine.test_model_parity import Oracle, Pair, capped, conditioned, run_both

CPU, BOUND = torch.device("cpu"), 2e-2
PREFIX = {"cpu": 70, "cuda": 1100}  # beyond the window of 64, of 1024
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def wide_config(device: torch.device) -> DiffusionGemmaConfig:
    """A sliding and a full layer of the published sizes; fewer ids."""
    gpu = device.type == "cuda"
    return small_config(
        ("sliding", "full"),
        full_kv_heads=2,
        full_head_dim=512,
        canvas_length=256 if gpu else 16,
        vocab_size=16384 if gpu else 1024,
        hidden_size=2816,
        intermediate_size=2112,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        num_experts=128 if gpu else 10,
        top_k_experts=8,
        moe_intermediate_size=704,
        sliding_window=1024 if gpu else 64,
        max_position_embeddings=4096,
    )


def wide_model(device: torch.device) -> DiffusionGemmaForBlockDiffusion:
    """transformers' model in bfloat16, made where it is to run, every weight random.

    Of experts that are about equally good for a row, rounding chooses, in transformers as here: with 128 independent
    ones that happens in every sixth row, moves it by a tenth and is all there is to see. So experts are alike but for
    a tenth of their weights: one wrong choice moves a row by a hundredth, nothing but wrong ones all by a tenth.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = DiffusionGemmaForBlockDiffusion(wide_config(device)).eval()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if "vision" in name or name.endswith(("inv_freq", "embed_scale")):
                continue
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.2, 0.3)  # attention of scale 1 over so many dimensions would be a hard choice
            elif "scalar" in name or "scale" in name or "norm" in name:
                weight.uniform_(0.6, 1.4)
            elif "embed_tokens" in name:
                weight.uniform_(-0.1, 0.1)
            else:
                most = (3 / weight.shape[-1]) ** 0.5
                weight.uniform_(-most, most)
                if ".experts." in name:
                    weight.mul_(0.1).add_(torch.empty_like(weight[:1]).uniform_(-most, most))
    return model


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A checkpoint, and transformers' model of it."""
    theirs = wide_model(torch.device(request.param))
    return save(theirs, tmp_path_factory.mktemp("wide")), Oracle(theirs)


def ours(folder: Path, device: torch.device, kernels: str, choice: Choice | None = None) -> DiffusionGemma:
    checkpoint = load_checkpoint(folder, device, torch.bfloat16, progress=False, choice=choice)
    pool = KVPool(checkpoint.config, 1, 2048, device, torch.bfloat16, chunk=1024 if device.type == "cuda" else 64)
    return assemble(checkpoint.config, checkpoint.tensors, pool, kernels, eight_bit=checkpoint.eight_bit)


def surely_the_same(pair: Pair) -> float:
    """The share of positions with the same argmax, of those whose two best logits differ by more than rounding may
    have moved them: by twice the bound."""
    same, sure = 0, 0
    for a, b in zip(pair.ours, pair.theirs, strict=True):
        best = b.topk(2, dim=-1).values
        apart = best[:, 0] - best[:, 1] > 2 * BOUND * b.square().mean().sqrt()
        same += int((a.argmax(-1) == b.argmax(-1))[apart].sum())
        sure += int(apart.sum())
    assert sure >= 20, "there must be something to agree on"
    return same / sure


def test_full_width_is_near_transformers(wide: tuple[Path, Oracle]) -> None:
    folder, oracle = wide
    device = oracle.model.device
    model = ours(folder, device, "triton" if device.type == "cuda" else "reference")
    pair = run_both(model, oracle, PREFIX[device.type], canvases=1 if device.type == "cpu" else 3)
    assert pair.relative <= BOUND
    assert surely_the_same(pair) >= 0.99
    assert pair.theirs[0].std() > 0.5, "the logits must not be trivial"


def two_steps(model: DiffusionGemma) -> Tensor:
    """Logits of a canvas' second pass."""
    (cache,) = fresh_slots(model, 1)
    model.commit(random_ids(PREFIX["cuda"], model.config.vocab_size, 1, model.device), cache)
    previous = None
    for step in range(2):
        canvas = random_ids(model.config.canvas_length, model.config.vocab_size, step, model.device)
        soft = conditioned(model, previous)
        logits = capped(model, model.denoise(canvas[None], soft, [cache])[0])
        previous = logits / 0.7
    return logits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("wide", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("quantize", "dense", "bound"),
    [("fp8", None, 8e-2), ("nvfp4", None, BOUND), ("nvfp4", "fp8", 8e-2), ("int4", None, BOUND)],
)
def test_full_width_quantised_is_near_the_reference(
    wide: tuple[Path, Oracle], quantize: str, dense: str | None, bound: float
) -> None:
    """As start-up chooses; the reference decodes the same weights. fp8 may round rows to 8 bit, 2.6e-2 a matrix: 6.1e-2
    of the logits were seen on an H200."""
    folder, oracle = wide
    device = oracle.model.device
    expected = two_steps(ours(folder, device, "reference", choose(quantize, dense)))
    result = two_steps(ours(folder, device, "triton", choose(quantize, dense)))
    assert (result - expected).norm() <= bound * expected.norm()
