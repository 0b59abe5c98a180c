"""The bundled model in every format: near the unquantised one in logits, and as right on prompts it answers.

Accuracy and steps on many prompts: python -m engine.demo.evaluate --quantize none,fp8,nvfp4,int4
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from engine.checkpoint import load_checkpoint
from engine.demo import corpus
from engine.demo.dataset import row_of
from engine.demo.evaluate import EVALUATION_SEED, HERE, Setup, evaluate
from engine.formats import choose
from engine.kernels import reference
from engine.kernels.readers import Experts
from engine.kernels.reference import REFERENCE
from engine.kernels.weights import Fp8Weight, Weight
from engine.kv_cache import KVPool
from engine.model.gemma4 import DiffusionGemma
from tests.engine.small_models import CPU

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("add", "capital", "reverse", "json", "memory")  # answered surely, and in few steps
# Root mean square error of the logits, of their spread; and the share of positions with the same argmax.
LIMITS = {
    ("fp8", None): (0.07, 0.98),
    ("nvfp4", None): (0.1, 0.98),
    ("nvfp4", "fp8"): (0.1, 0.98),
    ("int4", None): (0.1, 0.98),
    ("int4", "fp8"): (0.1, 0.98),
}


def logits(quantize: str | None, dense: str | None) -> Tensor:
    """float32 [prompts * canvas, vocabulary]: one pass over the right reply, half of its tokens replaced by noise."""
    checkpoint = load_checkpoint(HERE, CPU, torch.float32, progress=False, choice=choose(quantize, dense))
    config = checkpoint.config
    pool = KVPool(config, 1, 512, CPU, torch.float32)
    model = DiffusionGemma(config, checkpoint.tensors, REFERENCE, pool)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    generator = torch.Generator().manual_seed(0)
    found = []
    for family in FAMILIES:
        prompt, reply = row_of(corpus.example("test", 0, seed=EVALUATION_SEED, family=family), tokenizer)
        cache = pool.slots[0]
        cache.reset()
        model.commit(torch.tensor(prompt), cache)
        canvas = torch.zeros(config.canvas_length, dtype=torch.int64)
        canvas[: len(reply)] = torch.tensor(reply[: len(canvas)])
        noise = torch.randint(config.vocab_size, canvas.shape, generator=generator)
        noisy = torch.where(torch.rand(canvas.shape, generator=generator) < 0.5, noise, canvas)
        found.append(model.denoise(noisy[None], None, [cache])[0])
    return config.final_softcap * (torch.cat(found) / config.final_softcap).tanh()


@pytest.fixture(scope="module")
def unquantised() -> Tensor:
    return logits(None, None)


@pytest.mark.parametrize(("quantize", "dense"), LIMITS)
def test_logits_stay_near(quantize: str, dense: str | None, unquantised: Tensor) -> None:
    quantised = logits(quantize, dense)
    error, agreement = LIMITS[quantize, dense]
    assert ((quantised - unquantised).square().mean().sqrt() / unquantised.std()).item() < error
    assert (quantised.argmax(-1) == unquantised.argmax(-1)).float().mean().item() > agreement


@pytest.fixture(scope="module")
def fp8() -> Tensor:
    return logits("fp8", None)


@pytest.fixture
def eight_bit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ops with every row that meets an fp8 weight rounded to 8 bit, as on chips where that is faster."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    plain_linear, plain_experts, plain_gate = reference.linear, reference.experts, reference._gate

    def linear(x: Tensor, weight: Weight) -> Tensor:
        return plain_linear(rounded(x) if isinstance(weight, Fp8Weight) else x, weight)

    def experts(x: Tensor, chosen: Tensor, which: Experts) -> Tensor:
        return plain_experts(rounded(x), chosen, which)

    monkeypatch.setattr(reference, "linear", linear)
    monkeypatch.setattr(reference, "_gate", lambda both: rounded(plain_gate(both)))  # what the experts' down reads
    ops = replace(reference.REFERENCE, linear=linear, experts=experts)
    monkeypatch.setattr("engine.assemble.REFERENCE", ops)
    monkeypatch.setattr(f"{__name__}.REFERENCE", ops)


def test_logits_stay_near_with_8_bit_rows(fp8: Tensor, eight_bit_rows: None, unquantised: Tensor) -> None:
    quantised = logits("fp8", None)
    assert not torch.equal(quantised, fp8)  # rows were rounded
    error = (quantised - unquantised).square().mean().sqrt() / unquantised.std()
    assert error.item() < 0.085  # 0.081 with the bundled weights
    assert (quantised.argmax(-1) == unquantised.argmax(-1)).float().mean().item() > 0.98


def test_replies_stay_right_with_8_bit_rows(eight_bit_rows: None) -> None:
    found = evaluate(Setup(checkpoint=HERE, quantize="fp8"), 1, families=FAMILIES)
    assert found.right == dict.fromkeys(FAMILIES, 1.0)


@pytest.mark.parametrize("quantize", ["fp8", "nvfp4", "int4"])
def test_replies_stay_right_and_as_quick(quantize: str) -> None:
    plain, quantised = (
        evaluate(Setup(checkpoint=HERE, quantize=each), 1, families=FAMILIES) for each in (None, quantize)
    )
    assert plain.right == quantised.right == dict.fromkeys(FAMILIES, 1.0)
    assert sum(quantised.steps.values()) <= 1.1 * sum(plain.steps.values())
