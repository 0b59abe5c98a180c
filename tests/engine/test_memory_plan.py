"""Does it fit: what is counted is what loading takes, and what is said when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import options as choices
from engine.checkpoint import load_checkpoint, plan_checkpoint
from engine.config import load_model_config, published_config
from engine.engine import DiffusionEngine
from engine.formats import choose, layout
from engine.interface import EngineError, EngineOptions
from engine.kv_cache import KVPool
from engine.memory_plan import CARDS, CHOICES, GB, MemoryPlan, default_chunk, plan_memory, plans, refusal, usable
from engine.pages import PAGE
from tests.engine.quantised_models import SIZES
from tests.engine.small_models import CPU, random_model, save, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config(**SIZES)).bfloat16(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", CHOICES)
def test_planned_bytes_are_those_that_loading_takes(folder: Path, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        (plan,) = (plan for plan in plans(load_model_config(folder), itemsize=dtype.itemsize) if plan.format == name)
        loaded = load_checkpoint(folder, CPU, dtype, progress=False, choice=CHOICES[name])
        assert plan.weights == loaded.weight_bytes


@pytest.mark.parametrize("context", [1, 64, 200, 500])
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("slots", [1, 3])
def test_planned_kv_is_what_the_pool_takes(folder: Path, context: int, chunk: int, slots: int) -> None:
    config = load_model_config(folder)
    plan = plan_memory(config, layout(config), name="bf16", itemsize=4, gpu=False, commit_chunk=chunk)
    least = plan.needed(context, slots)
    for memory, more in ((least, False), (least + 10**6, True), (10**12, True)):
        pools = plan.pools(memory, slots=slots, context=context)
        assert pools is not None
        taken = KVPool(config, slots, context, CPU, torch.float32, chunk=chunk, pages=pools.pages).bytes
        assert taken == pools.bytes <= memory - plan.weights - plan.work(slots)
        assert (taken > least - plan.weights - plan.work(slots)) == more
    assert plan.pools(least - 1, slots=slots, context=context) is None


def test_the_published_model_in_figures() -> None:
    by_format = {plan.format: plan for plan in plans(published_config())}
    weights = {name: round(plan.weights / GB, 1) for name, plan in by_format.items()}
    assert weights == {
        "bf16": 50.5,
        "fp8": 26.1,
        "nvfp4": 17.7,
        "nvfp4, dense fp8": 16.1,
        "int4": 17.7,
        "int4, dense fp8": 16.0,
    }
    plan = by_format["nvfp4"]
    assert plan.full_page == 20_480 * 64  # bytes of KV a position in the full layers
    assert plan.slot_pages * plan.sliding_page == 204_800 * (1023 + 1024 + 256 + 1 + 64)  # in whole pages of 64
    assert plan.needed(16_384) - plan.weights < 3 * 2**30


PLAN = MemoryPlan(
    format="bf16",
    weights=1000,
    working=100,
    working_more=10,
    full_page=128,
    sliding_page=5,
    slot_pages=10,
    point_pages=3,
    canvas_length=50,
    max_context=8000,
)


def test_longest_context() -> None:
    assert PLAN.needed(0) == PLAN.needed(14) == 1150 + 64 * 2
    assert PLAN.needed(15) == 1150 + 128 * 2
    assert PLAN.needed(14, 3) == 1150 + 64 * 2 + 2 * (10 + 50)
    assert PLAN.context(PLAN.needed(8000), 1) == PLAN.context(10**9) == 8000
    assert PLAN.context(PLAN.needed(8000), 4) < PLAN.context(PLAN.needed(8000, 4), 4) == 8000
    assert PLAN.context(PLAN.needed(5000)) == 4096
    assert PLAN.context(PLAN.needed(1024)) == 1024
    assert PLAN.context(PLAN.needed(1024) - 1) == PLAN.context(0) == 0


def test_longest_context_of_a_checkpoint_with_a_small_limit() -> None:
    small = replace(PLAN, max_context=300)
    assert small.context(small.needed(300)) == 300
    assert small.context(small.needed(300) - 1) == 0


def test_slots_leave_half_of_the_memory_to_contexts() -> None:
    def slots(kv: int) -> int:
        pools = PLAN.pools(10**6, kv_bytes=kv, context=14)
        assert pools is not None
        return pools.slots

    assert [slots(kv) for kv in (10**5, 400, 399, 300, 299, 200, 199)] == [4, 4, 3, 3, 2, 1, 1]
    several = PLAN.pools(10**6, kv_bytes=5 * 50 + 256, context=64, slots=5)
    assert several is not None
    assert (several.slots, several.full, several.sliding) == (5, 2, 50)


def test_what_is_left_over_keeps_prefixes_but_never_more_than_is_of_use() -> None:
    plenty = PLAN.pools(10**9)
    assert plenty is not None
    one = -(-8050 // PAGE)
    assert (plenty.slots, plenty.context, plenty.full, plenty.sliding) == (4, 8000, 8 * one, 4 * 10 + 64 * 3)
    given = PLAN.pools(10**9, kv_bytes=10**8)
    assert given is not None
    assert 10**8 - 1000 < given.bytes <= 10**8, "what was asked for is taken"
    assert given.full / plenty.full == pytest.approx(given.sliding / plenty.sliding, rel=0.3)
    assert PLAN.pools(10**6, kv_bytes=10**6) is None


def published(name: str) -> MemoryPlan:
    return next(plan for plan in plans(published_config()) if plan.format == name)


def test_what_fits_is_not_refused() -> None:
    wanted = published("nvfp4")
    assert refusal(wanted, (), context=16_384, free=wanted.needed(16_384), where="cuda:0") is None
    assert refusal(wanted, (), context=16_384, free=wanted.needed(16_384) - 1, where="cuda:0") is not None
    assert refusal(wanted, (), context=None, free=wanted.needed(1024), where="cuda:0") is None


def test_a_refusal_names_formats_context_and_card() -> None:
    others = plans(published_config())
    said = refusal(published("bf16"), others, context=None, free=usable(24), where="cuda:0")
    assert said is not None
    assert "as bf16 it needs 53.2 GB (50.5 of weights" in said and "24.0 GB of memory are free on cuda:0" in said
    assert "--quantize nvfp4 (context up to" in said and "--quantize int4 --quantize-dense fp8" in said
    assert "--quantize fp8" not in said.replace("--quantize-dense fp8", "")
    assert "card of 96 GB" in said
    assert "context of up to" not in said.partition("what fits")[0]


def test_a_refusal_for_the_context_alone() -> None:
    wanted = published("nvfp4")
    said = refusal(wanted, (), context=262_144, free=usable(24), where="cuda:0")
    assert said is not None
    assert f"a context of up to {wanted.context(usable(24))} would fit" in said and "card of 32 GB" in said
    assert "what fits" not in said and "no format" not in said


def test_a_refusal_without_a_way_out() -> None:
    huge = replace(PLAN, format="nvfp4", weights=10**12)
    said = refusal(huge, (), context=None, free=10**9, where="cpu")
    assert said is not None
    assert "no format of this checkpoint fits there" in said and f"more than {CARDS[-1]} GB" in said


def test_nothing_is_read_if_it_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "available_memory", lambda device: 10_000)
    monkeypatch.setattr("engine.checkpoint.open_tensors", lambda *_: pytest.fail("the tensors were opened"))
    with pytest.raises(EngineError, match=r"does not fit: as nvfp4 it needs .* are free on cpu"):
        DiffusionEngine.from_options(EngineOptions(model=str(folder), device="cpu", quantize="nvfp4"))


def test_the_context_that_was_asked_for_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(folder, choose(None, None))
    needed = plan_memory(plan.config, plan.layout, name="bf16", itemsize=4, gpu=False, commit_chunk=512)
    monkeypatch.setattr(choices, "available_memory", lambda device: needed.needed(100))
    most = -(-(100 + needed.canvas_length) // PAGE) * PAGE - needed.canvas_length  # the page's last
    for context, fits in ((most, True), (most + 1, False)):
        options = EngineOptions(
            model=str(folder), device="cpu", dtype="float32", context_length=context, progress=False
        )
        if fits:
            DiffusionEngine.from_options(options).close()
        else:
            with pytest.raises(EngineError, match=f"a context of {most + 1}"):
                DiffusionEngine.from_options(options)


def test_memory_for_keys_and_values_that_was_asked_for(folder: Path) -> None:
    for gigabytes, slots in ((0.01, 4), (0.0007, 1)):
        built = DiffusionEngine.from_options(
            EngineOptions(model=str(folder), device="cpu", context_length=300, kv_memory=gigabytes, progress=False)
        )
        assert 0.6 * gigabytes * GB < built.info.kv_bytes <= gigabytes * GB
        assert (built.info.slots, built.info.context_length) == (slots, 300)
        built.close()
    with pytest.raises(EngineError, match=r"a context of 300 need .* cpu has .* of which 0.0001 GB were asked for"):
        DiffusionEngine.from_options(
            EngineOptions(model=str(folder), device="cpu", context_length=300, kv_memory=0.0001, progress=False)
        )


def test_the_context_is_as_long_as_memory_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(folder, choose(None, None))
    needed = plan_memory(plan.config, 0, name="bf16", itemsize=4, gpu=False)
    options = EngineOptions(model=str(folder))
    for free, slots in ((10**9, 4), (needed.needed(512) - needed.working, 1)):
        monkeypatch.setattr(choices, "free_memory", lambda device, free=free: free)
        pools = choices.choose_pools(plan.config, 0, options, CPU, torch.float32)
        assert (pools.slots, pools.context) == (slots, 512)
    monkeypatch.setattr(choices, "free_memory", lambda device: 1000)
    with pytest.raises(EngineError, match="1 slot and a context of 512 need"):
        choices.choose_pools(plan.config, 0, options, CPU, torch.float32)


def test_available_memory_of_this_host() -> None:
    assert 2**26 < choices.available_memory(CPU) < 2**50


def test_prompts_are_committed_in_longer_chunks_where_memory_is_plenty() -> None:
    assert [default_chunk(True, card * GB) for card in (12, 24, 48, 80, 141)] == [1024, 1024, 1024, 2048, 2048]
    assert default_chunk(False, 500 * GB) == 512
