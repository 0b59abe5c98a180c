"""The whole model on the op set for GPUs against the reference ops, and captured passes against the same not
captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import load_generation_defaults
from engine.denoise import Denoiser
from engine.images import book_ids
from engine.interface import Sampling
from engine.kernels.readers import Entrance
from engine.kernels.reference import REFERENCE, Operand, Ops
from engine.kernels.triton_ops import TRITON
from engine.model.gemma4 import DiffusionGemma
from engine.pages import PAGE
from tests.engine.small_models import fresh_slots, load_model, random_ids, random_model, save, small_config
from tests.engine.vision_models import image, prompt_with, save_vision, vision_model

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
BUCKETS = (64, 128)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As little as shows everything: the interpreter runs one program of a kernel after the other."""
    config = small_config(("sliding", "full"), num_experts=4)
    return save(random_model(config), tmp_path_factory.mktemp("two_layers"))


def last_pass(model: DiffusionGemma, device: torch.device) -> Tensor:
    """Logits of a pass that commits a chunk of one slot and denoises its canvas and that of another slot, whose prefix
    is longer than a page."""
    vocab, length = model.config.vocab_size, model.config.canvas_length
    first, second = fresh_slots(model, 2)
    canvas = torch.stack([random_ids(length, vocab, 30 + slot, device) for slot in range(2)])
    soft = torch.randn(2, length, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    model.commit(random_ids(PAGE + 5, vocab, 1, device), first)
    chunk = random_ids(37, vocab, 2, device)
    logits = model.run([(chunk, second)], canvas, soft.to(device, model.dtype), [first, second])
    assert logits is not None
    return logits


def test_the_model_on_triton_equals_the_reference(two_layers: Path, device: torch.device) -> None:
    """float32 where the interpreter computes it exactly; what a GPU is for is bfloat16."""
    dtype, bound = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 2e-2)
    expected = last_pass(load_model(two_layers, device, dtype, chunk=128), device)
    result = last_pass(load_model(two_layers, device, dtype, chunk=128, ops=TRITON, buckets=BUCKETS), device)
    assert result.isfinite().all()
    assert (result - expected).float().norm() <= bound * expected.float().norm()


@dataclass(frozen=True)
class Shut:
    """Rows that only an op set looks into."""

    rows: Tensor


def shut_ops() -> Ops:
    """The reference ops, whose joins hand over what a model cannot look into."""

    def join_attention(*given: Any) -> tuple[Tensor, Shut, Shut, Tensor]:
        h, mlp, experts, router = REFERENCE.join_attention(*given)
        return h, Shut(mlp), Shut(experts), router

    def join_layer(h: Tensor, *given: Any) -> tuple[Tensor, Operand]:
        following = next(each for each in given if isinstance(each, Entrance))
        x, normed = REFERENCE.join_layer(h, *given)
        return x, normed if following.reader is None else Shut(normed)

    def opened(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *given: op(x.rows if isinstance(x, Shut) else x, *given)

    return replace(
        REFERENCE,
        join_attention=join_attention,
        join_layer=join_layer,
        linear=opened(REFERENCE.linear),
        gated_mlp=opened(REFERENCE.gated_mlp),
        experts=opened(REFERENCE.experts),
    )


def test_a_model_does_not_look_into_what_ops_hand_over(two_layers: Path) -> None:
    device = torch.device("cpu")
    expected = last_pass(load_model(two_layers, device, torch.float32, chunk=128), device)
    result = last_pass(load_model(two_layers, device, torch.float32, chunk=128, ops=shut_ops()), device)
    assert torch.equal(result, expected)


def test_images_on_triton_are_those_of_the_reference(tmp_path: Path, device: torch.device) -> None:
    """Two images and a canvas in one pass; a planner that fills rows up has them in other rows."""
    config = {"kinds": ("sliding", "full"), "num_experts": 4}
    folder = save_vision(vision_model(**config), tmp_path)
    request = prompt_with(PAGE - 6, image(1), 7, image(2, columns=3, rows=6), 4)
    dtype, bound = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 2e-2)
    found = []
    for options in ({}, {"ops": TRITON, "buckets": BUCKETS}):
        model = load_model(folder, device, dtype, chunk=128, **options)  # type: ignore[arg-type]
        assert model.vision is not None
        model.vision.look(request.images)
        (cache,) = fresh_slots(model, 1)
        plan = model.plan([(book_ids(request), cache)], [(0, cache)])
        canvas = random_ids(model.config.canvas_length, model.config.vocab_size, 3, device)[None]
        logits = model.forward(plan, canvas, None)
        assert logits is not None
        found.append(logits.clone())
    assert found[1].isfinite().all()
    assert (found[1] - found[0]).float().norm() <= bound * found[0].float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_pass_equals_the_same_not_captured(small_checkpoint: Path) -> None:
    """To the bit, over canvases that open and close in two slots while chunks are committed."""
    device = torch.device("cuda")
    schedule = load_generation_defaults(small_checkpoint)
    results = []
    for graphs in (False, True):
        model = load_model(small_checkpoint, device, torch.bfloat16, ops=TRITON, buckets=BUCKETS)
        denoiser = Denoiser(
            model,
            schedule,
            slots=2,
            canvas_length=model.config.canvas_length,
            vocab_size=model.config.vocab_size,
            device=device,
            graphs=graphs,
        )
        caches = fresh_slots(model, 2)
        found = []
        for turn in range(4):
            prompt = random_ids(20 + turn, model.config.vocab_size, turn).tolist()
            denoiser.step([], [], [(prompt, caches[0])])
            canvases = [denoiser.open(slot, Sampling(seed=turn + slot), turn) for slot in range(2)]
            denoiser.step(canvases[:1], caches[:1], [(prompt, caches[1])])
            for _ in range(5):
                denoiser.step(canvases, caches)
                found.append([denoiser.found(canvas) for canvas in canvases])
        results.append(found)
    assert results[0] == results[1]
