"""Prompts with images against transformers' DiffusionGemmaForBlockDiffusion, and the engine against itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from engine.checkpoint import load_checkpoint, plan_checkpoint
from engine.config import PUBLISHED_VISION, load_model_config
from engine.engine import DiffusionEngine
from engine.images import book_ids
from engine.interface import (
    CanvasDone,
    CheckpointError,
    EngineError,
    EngineOptions,
    Finished,
    GenerationRequest,
    ImagePatches,
)
from engine.memory_plan import plan_memory
from engine.model.gemma4 import DiffusionGemma
from engine.pages import PAGE
from engine.scheduler import Scheduler
from engine.tensor_names import PROJECTION, vision_table
from tests.engine.small_models import fresh_slots, load_model, random_ids
from tests.engine.test_model_parity import capped
from tests.engine.vision_models import MOST_TOKENS, VisionOracle, image, prompt_with, save_vision, vision_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(vision_model(), tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> DiffusionGemmaForBlockDiffusion:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DiffusionGemma:
    return load_model(checkpoint)


def logits_after(model: DiffusionGemma, request: GenerationRequest, chunks: list[int] | None = None) -> list[Tensor]:
    """Two canvases' logits after a prompt committed at once, or in chunks that end at the places given."""
    (cache,) = fresh_slots(model, 1)
    assert model.vision is not None
    model.vision.look(request.images)
    ids = book_ids(request)
    ends = [*(chunks or []), len(ids)]
    for begin, end in zip([0, *ends], ends, strict=False):
        plan = model.plan([(ids[begin:end], cache)], [])
        model.forward(plan, None, None)
        plan.advance()
    found = []
    for seed in (2, 3):
        canvas = random_ids(model.config.canvas_length, model.config.vocab_size, seed)
        found.append(capped(model, model.denoise(canvas[None], None, [cache])[0]))
    return found


PROMPTS = {
    "one image": prompt_with(5, image(1), 4),
    "two images": prompt_with(5, image(1), 4, image(2, columns=3, rows=27), 7),
    "an image first": prompt_with(image(3, columns=3, rows=3), 3),
    "an image over the edge of a page": prompt_with(PAGE - 5, image(1, columns=9, rows=9), 20, image(2), 1),
    "an image beyond the window": prompt_with(3, image(1), 40),
    "the same image twice": prompt_with(3, image(1), image(1), 2),
}


@pytest.mark.parametrize("request_", PROMPTS.values(), ids=PROMPTS.keys())
def test_logits_equal_transformers(
    theirs: DiffusionGemmaForBlockDiffusion, model: DiffusionGemma, request_: GenerationRequest
) -> None:
    oracle = VisionOracle(theirs)
    oracle.commit(request_)
    for ours, seed in zip(logits_after(model, request_), (2, 3), strict=True):
        expected = oracle.denoise(random_ids(model.config.canvas_length, model.config.vocab_size, seed))
        assert (ours - expected).abs().max() <= 1e-4
        assert expected.std() > 0.5, "the logits must not be trivial"


def test_chunks_and_the_middle_of_an_image_change_nothing(model: DiffusionGemma) -> None:
    """An image's tokens may be committed in part only where all of them were once: then the rest sees the same."""
    request = PROMPTS["two images"]
    whole = logits_after(model, request)
    first, second = request.images
    apart = logits_after(model, request, [first.at - 1, first.at + first.tokens, second.at])
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))


def test_an_image_is_told_by_its_content(model: DiffusionGemma) -> None:
    other = prompt_with(5, image(4), 4)
    assert not torch.allclose(logits_after(model, PROMPTS["one image"])[0], logits_after(model, other)[0], atol=1e-2)


# The engine


def run(
    engine: DiffusionEngine, *requests: GenerationRequest, names: tuple[str, ...] = ()
) -> dict[str, tuple[list[int], Finished]]:
    """Ids and end of each request; `names`: of those that run already."""
    for each in requests:
        engine.submit(each)
    ids: dict[str, list[int]] = {name: [] for name in (*names, *(each.id for each in requests))}
    ends: dict[str, Finished] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, CanvasDone):
                ids[event.request_id] += event.token_ids
            elif isinstance(event, Finished):
                ends[event.request_id] = event
        engine._seating.check_integrity()
    return {name: (ids[name], ends[name]) for name in ids}


def build(checkpoint: Path, **options: Any) -> DiffusionEngine:
    defaults = {"kernels": "reference", "device": "cpu", "progress": False, "context_length": 300, "slots": 2}
    return DiffusionEngine.from_options(EngineOptions(model=str(checkpoint), **(defaults | options)))


def cached(found: tuple[list[int], Finished]) -> int:
    return found[1].usage.cached_tokens


def test_a_prefix_is_reused_up_to_the_first_other_image(checkpoint: Path) -> None:
    engine = build(checkpoint)
    before = replace(prompt_with(70, image(1), 4), max_tokens=8)
    tokens = before.images[0].tokens
    fresh = run(engine, before)["a"]
    assert (cached(fresh), fresh[1].usage.prompt_tokens) == (0, 70 + tokens + 2 + 4)
    again = run(engine, before)["a"]
    assert again[0] == fresh[0]
    assert cached(again) == 70 + tokens + 2 + 4, "the same image is found, and not looked at again"
    other = run(engine, replace(prompt_with(70, image(2), 4), max_tokens=8))["a"]
    assert cached(other) == 70 + 1, "up to the image, which has the same ids"
    assert other[0] == run(build(checkpoint), replace(prompt_with(70, image(2), 4), max_tokens=8))["a"][0]


def test_a_request_that_lost_its_slot_has_its_images_still(checkpoint: Path) -> None:
    first = replace(prompt_with(40, image(1), 60), id="a", max_tokens=60)
    second = replace(prompt_with(-41, image(2), 60), id="b", max_tokens=60)
    alone = {each.id: run(build(checkpoint), each)[each.id][0] for each in (first, second)}
    engine = build(checkpoint)
    engine.submit(first)
    engine.submit(second)
    while not len(engine._scheduler.ready()) == 2:
        assert not engine.step()
    assert engine._vision is not None
    engine._vision._found.clear()
    engine._seating.vacate(engine._scheduler.preempt(), suspect=True)  # as if pages had run out, and nothing were kept
    assert {name: found[0] for name, found in run(engine, names=("a", "b")).items()} == alone
    assert engine._vision._found.keys() == {second.images[0].number}, "the other one is not looked at again"


def test_prompts_in_small_chunks_give_the_same_reply(checkpoint: Path) -> None:
    request = replace(prompt_with(30, image(1), 30, image(2), 90, image(3), 5), max_tokens=16)
    assert run(build(checkpoint, commit_chunk=11), request) == run(build(checkpoint), request)


def test_chunks_never_leave_an_image_off() -> None:
    request = prompt_with(30, image(1), 30, image(2), 90, image(3), 5)
    ids, inside = (
        book_ids(request),
        {place for each in request.images for place in range(each.at + 1, each.at + each.tokens)},
    )
    for chunk in range(6, 130, 3):
        scheduler = Scheduler(slots=1, max_waiting=1, commit_chunk=chunk, context_length=400, eos_ids=frozenset({1}))
        scheduler.submit(request)
        scheduler.seat()
        committed: list[int] = []
        while len(committed) < len(ids):
            (part,) = scheduler.next_commits()
            assert 0 < len(part.token_ids) <= chunk
            committed += part.token_ids
            assert len(committed) not in inside
        assert committed == ids


# What is refused, what is loaded


def altered(at: int = 6, **changes: Any) -> GenerationRequest:
    request = PROMPTS["one image"]
    return replace(request, images=(replace(request.images[0], **({"at": at} | changes)),))


REFUSED = {
    "stands at 7": altered(at=7),
    "stands at -1": altered(at=-1),
    "has 5 tokens for": altered(tokens=5),
    "has 8 x 6 patches": altered(columns=8),
    "bytes of pixels": altered(pixels=b"1234"),
    "at most 9": prompt_with(2, image(1, columns=15, rows=6), 2),
    "before or against": replace(PROMPTS["one image"], images=PROMPTS["one image"].images * 2),
}


@pytest.mark.parametrize(("message", "request_"), REFUSED.items(), ids=REFUSED.keys())
def test_images_that_cannot_be_are_refused(checkpoint: Path, message: str, request_: GenerationRequest) -> None:
    engine = build(checkpoint)
    with pytest.raises(EngineError, match=rf"images\[[01]\].*{message}"):
        engine.submit(request_)
    assert not engine.has_work


def test_who_takes_images(checkpoint: Path, small_checkpoint: Path) -> None:
    info = build(checkpoint).info
    assert (info.image_tokens, info.image_id) == (MOST_TOKENS, 5)
    for engine in (build(checkpoint, images=False), build(small_checkpoint)):
        assert (engine.info.image_tokens, engine.info.image_id) == (0, None)
        assert engine.info.weight_bytes < info.weight_bytes
        assert engine.info.parameters == info.parameters, "of the text model"
        with pytest.raises(EngineError, match="this model takes none"):
            engine.submit(PROMPTS["one image"])


@pytest.mark.parametrize("options", [{"commit_chunk": 8}, {}])
def test_an_image_must_fit_a_pass_and_the_window(checkpoint: Path, tmp_path: Path, options: dict[str, int]) -> None:
    if not options:
        checkpoint = save_vision(vision_model(sliding_window=9), tmp_path)
    with pytest.raises(EngineError, match=r"up to 9 tokens, which are committed at once.*is 8"):
        build(checkpoint, **options)


def test_the_tables_of_names_are_those_of_transformers(checkpoint: Path) -> None:
    config = load_model_config(checkpoint)
    assert config.vision is not None
    for vision in (config.vision, PUBLISHED_VISION):
        settings = {
            "hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
            "num_key_value_heads": vision.kv_heads, "head_dim": vision.head_dim, "patch_size": vision.patch_size,
            "position_embedding_size": vision.positions, "standardize": vision.standardize,
        }  # fmt: skip
        with torch.device("meta"):
            theirs = Gemma4VisionModel(Gemma4VisionConfig(**settings)).state_dict()
        ours = vision_table(vision, 48)
        assert ours.pop(PROJECTION).shape == (48, vision.hidden_size)
        assert {name: place.shape for name, place in ours.items()} == {
            f"model.encoder.vision_tower.{name}": tuple(tensor.shape) for name, tensor in theirs.items()
        }
    assert len(vision_table(PUBLISHED_VISION, 2816)) == 386 - 30, "all of the encoder's but the layer scalars"


def test_memory_counts_the_tower(checkpoint: Path) -> None:
    plan = plan_checkpoint(checkpoint)
    loaded = load_checkpoint(checkpoint, torch.device("cpu"), torch.float32, progress=False)
    assert plan.layout.weight_bytes(4) == loaded.weight_bytes
    text = plan_checkpoint(checkpoint, images=False)
    tower = sum(torch.Size(place.shape).numel() for place in vision_table(plan.config.vision, 48).values())
    assert plan.layout.weight_bytes(4) - text.layout.weight_bytes(4) == 4 * tower
    works = [plan_memory(each.config, each.layout, name="", gpu=False).working for each in (plan, text)]
    assert works[0] > works[1]


def test_a_tower_that_is_missing_is_named(tmp_path: Path, small_checkpoint: Path) -> None:
    model = vision_model()
    del model.model.encoder.vision_tower.std_bias
    folder = save_vision(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"vision_tower\.std_bias; it says how images.*--images off"):
        load_checkpoint(folder, torch.device("cpu"), torch.float32, progress=False)


def test_where_the_processor_says_how_large_images_are(checkpoint: Path, tmp_path: Path) -> None:
    for name, content in (("preprocessor_config.json", {"max_soft_tokens": 70}), ("processor_config.json", {})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        vision = load_model_config(folder).vision
        assert vision is not None and vision.most_tokens == content.get("max_soft_tokens", 280)


def test_the_same_pixels_in_another_shape_are_another_image() -> None:
    wide, high = image(1, columns=9, rows=6), image(1, columns=6, rows=9)
    assert wide.pixels == high.pixels and wide.number != high.number
    assert wide.number == replace(wide, at=70).number
    assert isinstance(wide, ImagePatches)
