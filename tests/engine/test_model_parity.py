"""The model against transformers' DiffusionGemmaForBlockDiffusion, and the model against itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from engine.model.gemma4 import DiffusionGemma
from engine.pages import PAGE
from tests.engine.small_models import fresh_slots, load_model, random_ids, random_model, save, small_config

WINDOW = 12  # of small_config
TEMPERATURE = 0.7


class Oracle:
    """transformers' model and its cache behind our two operations."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config())

    def commit(self, ids: Tensor) -> None:
        with torch.inference_mode():
            self.model.model.encoder(input_ids=ids[None], past_key_values=self.cache)

    def denoise(self, canvas: Tensor, previous: Tensor | None) -> Tensor:
        """`previous`: logits of the last step divided by the temperature."""
        if previous is not None:
            previous = previous.to(self.model.dtype)[None]
        with torch.inference_mode():
            out = self.model(
                past_key_values=self.cache, decoder_input_ids=canvas[None], self_conditioning_logits=previous
            )
        return out.logits[0]


@dataclass
class Pair:
    """The logits of both for the same inputs."""

    ours: list[Tensor]
    theirs: list[Tensor]

    @property
    def worst(self) -> float:
        return max((a - b).abs().max().item() for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def relative(self) -> float:
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(self.ours, self.theirs, strict=True))


def capped(model: DiffusionGemma, logits: Tensor) -> Tensor:
    """The softcap, which `run` leaves to `read`: float32, as transformers returns logits."""
    softcap = model.config.final_softcap
    return (logits.float() / softcap).tanh() * softcap


def conditioned(model: DiffusionGemma, logits: Tensor | None) -> Tensor | None:
    """Self-conditioning [1, C, M] from processed logits [C, V], rounded where transformers rounds."""
    if logits is None:
        return None
    return model.embed_soft(logits.to(model.dtype).softmax(-1, dtype=torch.float32).to(model.dtype))[None]


def run_both(model: DiffusionGemma, oracle: Oracle, prefix: int, *, canvases: int = 3) -> Pair:
    """Commit a prefix, then denoise `canvases` in two steps each (self-conditioned in the second), committing each.

    Both sides get the same ids and, as self-conditioning, the oracle's logits.
    """
    config, device = model.config, model.device
    (cache,) = fresh_slots(model, 1)
    ids = random_ids(prefix, config.vocab_size, 1, device)
    oracle.commit(ids)
    model.commit(ids, cache)
    pair = Pair([], [])
    for index in range(canvases):
        previous = None
        for step in range(2):
            canvas = random_ids(config.canvas_length, config.vocab_size, 10 * index + step + 2, device)
            pair.theirs.append(oracle.denoise(canvas, previous))
            pair.ours.append(capped(model, model.denoise(canvas[None], conditioned(model, previous), [cache])[0]))
            previous = pair.theirs[-1] / TEMPERATURE
        oracle.commit(canvas)
        model.commit(canvas, cache)
    assert all(logits.dtype == torch.float32 for logits in pair.ours)
    return pair


@pytest.fixture(scope="module")
def theirs(small_checkpoint: Path) -> DiffusionGemmaForBlockDiffusion:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(small_checkpoint).eval()


@pytest.fixture(scope="module")
def model(small_checkpoint: Path) -> DiffusionGemma:
    return load_model(small_checkpoint)


@pytest.mark.parametrize(
    "prefix", [1, 5, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7]
)
def test_logits_equal_transformers(small_checkpoint: Path, device: torch.device, prefix: int) -> None:
    oracle = Oracle(DiffusionGemmaForBlockDiffusion.from_pretrained(small_checkpoint).eval().to(device))
    pair = run_both(load_model(small_checkpoint, device), oracle, prefix)
    assert pair.worst <= 1e-4
    assert pair.theirs[0].std() > 0.5, "the logits must not be trivial"


def test_the_comparison_sees_swapped_layer_scalars(
    small_checkpoint: Path, theirs: DiffusionGemmaForBlockDiffusion
) -> None:
    broken = load_model(small_checkpoint)
    layer = broken._layers[0]
    layer.scalars = layer.scalars.flip(0)
    assert run_both(broken, Oracle(theirs), 20).worst > 1e-2


def bfloat16_pair(kinds: tuple[str, ...], prefix: int, device: torch.device, folder: Path) -> tuple[Pair, Pair]:
    """Ours and theirs in bfloat16; ours in float32 and theirs in bfloat16. Same (bfloat16) weights.

    Every expert is chosen: near ties between experts fall either way after rounding, in transformers as here, and in
    so small a model one such row would hide everything else.
    """
    save(random_model(small_config(kinds, num_experts=3, top_k_experts=3)).bfloat16(), folder)
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    rounded, exact = (load_model(folder, device, dtype) for dtype in (torch.bfloat16, torch.float32))
    return run_both(rounded, Oracle(theirs), prefix), run_both(exact, Oracle(theirs), prefix)


@pytest.mark.parametrize("prefix", [WINDOW - 2, 3 * WINDOW])
def test_bfloat16_is_near_transformers(tmp_path: Path, device: torch.device, prefix: int) -> None:
    pair, _ = bfloat16_pair(("sliding", "full"), prefix, device, tmp_path)
    assert pair.relative <= 2e-2


@pytest.mark.parametrize("prefix", [WINDOW - 2, 3 * WINDOW])
def test_bfloat16_is_as_exact_as_transformers(tmp_path: Path, device: torch.device, prefix: int) -> None:
    """In a deeper model rounding errors grow past any fixed bound, but ours no faster than theirs."""
    rounded, exact = bfloat16_pair(("sliding", "sliding", "full", "sliding", "full"), prefix, device, tmp_path)
    assert Pair(rounded.ours, exact.ours).relative <= 1.5 * Pair(exact.theirs, exact.ours).relative


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of small_config."""
    kinds = ["sliding", *draw(st.lists(st.sampled_from(["sliding", "full"]), max_size=2)), "full"]
    heads = draw(st.sampled_from([2, 4]))
    experts = draw(st.integers(2, 9))
    return {
        "kinds": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, heads // 2, heads])),
        "full_kv_heads": draw(st.sampled_from([1, heads])),
        "head_dim": draw(st.sampled_from([8, 16])),
        "full_head_dim": draw(st.sampled_from([8, 16, 32])),
        "hidden_size": draw(st.sampled_from([16, 40])),
        "canvas_length": draw(st.integers(1, 9)),
        "sliding_window": draw(st.integers(2, 20)),
        "num_experts": experts,
        "top_k_experts": draw(st.integers(1, min(experts, 4))),
        "final_logit_softcapping": draw(st.sampled_from([30.0, 5.0])),
    }


@settings(max_examples=15, deadline=None, derandomize=True)
@given(keys=configs(), prefix=st.integers(1, 140), chunk=st.integers(1, 30), seed=st.integers(0, 99))
def test_logits_equal_transformers_for_any_config(keys: dict[str, Any], prefix: int, chunk: int, seed: int) -> None:
    theirs = random_model(small_config(**keys), seed)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(save(theirs, Path(folder)), chunk=chunk)
    assert run_both(model, Oracle(theirs), prefix, canvases=2).worst <= 1e-4


@pytest.mark.parametrize("splits", [[145], [1] * 145, [3, 102, 40], [144, 1], [64, 64, 17]])
def test_commit_in_chunks_equals_commit_at_once(small_checkpoint: Path, splits: list[int]) -> None:
    model = load_model(small_checkpoint, chunk=150)
    ids = random_ids(145, model.config.vocab_size, 3)
    canvas = random_ids(model.config.canvas_length, model.config.vocab_size, 4)[None]
    whole, parts = fresh_slots(model, 2)
    model.commit(ids, whole)
    for part in ids.split(splits):
        model.commit(part, parts)
    assert parts.length == whole.length == 145
    expected = model.denoise(canvas, None, [whole])
    torch.testing.assert_close(model.denoise(canvas, None, [parts]), expected, atol=1e-5, rtol=1e-5)


def test_committing_a_canvas_then_going_on_equals_prefilling_the_joined_text(model: DiffusionGemma) -> None:
    ids = random_ids(50, model.config.vocab_size, 5)
    length = model.config.canvas_length
    stepwise, joined = fresh_slots(model, 2)
    model.commit(ids[:20], stepwise)
    for start in (20, 20 + length):
        final = ids[start : start + length]
        model.denoise(final[None], None, [stepwise])
        model.commit(final, stepwise)
    model.commit(ids[: 20 + 2 * length], joined)
    canvas = random_ids(length, model.config.vocab_size, 6)[None]
    a, b = model.denoise(canvas, None, [stepwise]), model.denoise(canvas, None, [joined])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 5, PAGE - 3, PAGE, 2 * PAGE + 1])
def test_commit_and_first_denoise_share_a_pass(small_checkpoint: Path, device: torch.device, prefix: int) -> None:
    """A finished canvas of one slot, a chunk of a prompt of another and four canvases: all at once, or one by one."""
    model = load_model(small_checkpoint, device)
    vocab, length = model.config.vocab_size, model.config.canvas_length
    canvas = torch.stack([random_ids(length, vocab, 30 + slot, device) for slot in range(4)])
    soft = torch.randn(4, length, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    chunks = [random_ids(count, vocab, 40 + count, device) for count in (length, 37)]
    slots = fresh_slots(model, 4)
    for seed, cache in enumerate(slots):
        model.commit(random_ids(prefix + seed, vocab, seed, device), cache)
    together = model.run(list(zip(chunks, slots, strict=False)), canvas, soft, slots)
    assert together is not None
    slots = fresh_slots(model, 4)
    for seed, cache in enumerate(slots):
        model.commit(random_ids(prefix + seed, vocab, seed, device), cache)
    for chunk, cache in zip(chunks, slots, strict=False):
        model.commit(chunk, cache)
    for slot, cache in enumerate(slots):
        alone = model.denoise(canvas[slot : slot + 1], soft[slot : slot + 1], [cache])
        torch.testing.assert_close(together[slot], alone[0], atol=2e-5, rtol=1e-5)


def test_denoise_leaves_what_is_committed_as_it_was(model: DiffusionGemma) -> None:
    (cache,) = fresh_slots(model, 1)
    model.commit(random_ids(20, model.config.vocab_size, 7), cache)
    canvas = random_ids(model.config.canvas_length, model.config.vocab_size, 8)[None]
    other = random_ids(model.config.canvas_length, model.config.vocab_size, 9)[None]
    before = model.denoise(canvas, None, [cache])
    model.denoise(other, None, [cache])
    assert cache.length == 20
    assert torch.equal(model.denoise(canvas, None, [cache]), before)


def test_a_slot_used_again_holds_nothing_of_before(model: DiffusionGemma) -> None:
    canvas = random_ids(model.config.canvas_length, model.config.vocab_size, 8)[None]
    ids = random_ids(30, model.config.vocab_size, 7)
    (cache,) = fresh_slots(model, 1)
    model.commit(ids, cache)
    expected = model.denoise(canvas, None, [cache])
    for cache in fresh_slots(model, 4):
        model.commit(random_ids(200, model.config.vocab_size, 9), cache)
    (cache,) = fresh_slots(model, 1)
    model.commit(ids, cache)
    assert torch.equal(model.denoise(canvas, None, [cache]), expected)


def test_a_slot_does_not_depend_on_its_neighbours(small_checkpoint: Path, device: torch.device) -> None:
    """To 1e-5, not to the bit: matmuls of more rows may sum in another order."""
    model = load_model(small_checkpoint, device)
    config, length = model.config, model.config.canvas_length
    caches, canvases = fresh_slots(model, 4), []
    for slot, (prefix, cache) in enumerate(zip((5, 130, 0, 12), caches, strict=True)):
        model.commit(random_ids(prefix, config.vocab_size, slot, device), cache)
        canvases.append(random_ids(length, config.vocab_size, 20 + slot, device))
    canvas = torch.stack(canvases)
    found = (capped(model, model.denoise(canvas, None, caches)) / TEMPERATURE).softmax(-1)
    soft = torch.stack([model.embed_soft(probabilities) for probabilities in found])
    together = model.denoise(canvas, soft, caches)
    for slot, cache in enumerate(caches):
        alone = model.denoise(canvas[slot : slot + 1], soft[slot : slot + 1], [cache])
        torch.testing.assert_close(together[slot], alone[0], atol=1e-5, rtol=1e-5)


def test_zero_self_conditioning_is_the_first_step(model: DiffusionGemma) -> None:
    (cache,) = fresh_slots(model, 1)
    model.commit(random_ids(9, model.config.vocab_size, 9), cache)
    canvas = random_ids(model.config.canvas_length, model.config.vocab_size, 10)[None]
    zeros = torch.zeros(1, model.config.canvas_length, model.config.hidden_size)
    torch.testing.assert_close(model.denoise(canvas, zeros, [cache]), model.denoise(canvas, None, [cache]))


def test_commit_beyond_the_capacity_is_refused_before_anything_is_written(small_checkpoint: Path) -> None:
    model = load_model(small_checkpoint, capacity=16, chunk=4)
    cache = model.pool.slots[0]
    model.commit(random_ids(10, model.config.vocab_size, 11), cache)
    with pytest.raises(ValueError, match="capacity of 16"):
        model.commit(random_ids(7, model.config.vocab_size, 12), cache)
    assert cache.length == 10
