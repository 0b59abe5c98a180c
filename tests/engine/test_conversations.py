"""Several requests at a time and turns that go on from committed prefixes: what is reused, and that nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import engine as package
from engine.checkpoint import load_checkpoint
from engine.engine import DiffusionEngine
from engine.interface import CanvasDone, EngineOptions, Event, Finished, GenerationRequest, Sampling, Schedule
from engine.kernels.reference import REFERENCE
from engine.kv_cache import KVCache, KVPool
from engine.model.gemma4 import DiffusionGemma
from engine.options import choose_dtype
from engine.pages import PAGE
from tests.engine.test_engine import EOS, ScriptedModel, countdown, make, reply, request, run

CPU = torch.device("cpu")
NAMES, ANIMALS = ("Mia", "Tom", "Ana", "Leo"), ("a fox", "an owl", "a bear", "a cat")
DEMO = Path(package.__file__).parent / "demo" / "checkpoint"


def checked(engine: DiffusionEngine) -> list[Event]:
    """Run to the end; the books are in order after every step."""
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
        engine._seating.check_integrity()
    return events


def finished(events: Sequence[Event], name: str) -> Finished:
    return reply(events, name)[1]


# With a scripted model


def long_request(name: str, prompt: Sequence[int], **options: int) -> GenerationRequest:
    return request(name, prompt, **options)  # type: ignore[arg-type]


def test_the_tenth_turn_commits_only_what_is_new() -> None:
    model = ScriptedModel(countdown(10_000))
    engine = make(model, context=2000, commit_chunk=64)
    history = [5, 6, 7] * 20
    for turn in range(10):
        history += [8, 9, 10 + turn]
        model.commits.clear()
        engine.submit(long_request("a", history, max_tokens=10))
        ids, end = reply(run(engine))
        new = 60 + 3 if turn == 0 else 3
        assert end.usage.cached_tokens == len(history) - new
        assert model.commits[0] == history[-new:]
        assert sum(map(len, model.commits)) == new + 10, "what is new, and the reply: its last canvas when idle"
        history += ids


def test_a_reply_is_found_up_to_its_end() -> None:
    """The eos id is committed too; what a template puts behind it is new."""
    engine = make(ScriptedModel(countdown(6)), context=300)
    engine.submit(request("a", (5, 6, 7)))
    ids, _ = reply(run(engine))
    engine.submit(long_request("b", [5, 6, 7, *ids, EOS, 9, 9]))
    assert finished(run(engine), "b").usage.cached_tokens == 3 + 6 + 1


def test_a_waiting_request_comes_before_the_end_of_a_reply() -> None:
    model = ScriptedModel(countdown(6))
    engine = make(model, context=300)
    engine.submit(request("a", (5, 6, 7)))
    while not any(isinstance(event, Finished) for event in engine.step()):
        pass
    assert engine.has_work, "its last canvas is not committed"
    engine.submit(request("b", (8, 8)))
    engine.step()
    assert model.commits[-1] == [8, 8]
    run(engine)
    assert model.commits.count([24, 25, EOS]) == 1, "b's; a's lost the only slot"


def test_a_turn_that_comes_at_once_finds_all_that_was_committed() -> None:
    """Before the last canvas is committed: what lies in the last page, which is not full, is found all the same."""
    model = ScriptedModel(countdown(6))
    engine = make(model, context=300, slots=2)
    engine.submit(request("a", (5, 6, 7)))
    events: list[Event] = []
    while not events or not isinstance(events[-1], Finished):
        events += engine.step()
    engine.submit(long_request("b", [5, 6, 7, *reply(events)[0], EOS, 9, 9]))
    assert finished(checked(engine), "b").usage.cached_tokens == 3 + 4
    assert model.commits[2] == [24, 25, EOS, 9]
    assert len(engine.stats().running) == 0


def test_two_conversations_taking_turns_both_keep_hitting() -> None:
    engine = make(ScriptedModel(countdown(10_000)), context=1000, commit_chunk=64)
    histories = {"x": [5] * 100, "y": [6] * 90}
    for turn in range(6):
        for name, history in histories.items():
            engine.submit(long_request(name, history, max_tokens=9))
            ids, end = reply(checked(engine), name)
            assert end.usage.cached_tokens == (len(history) - 2 if turn else 0)
            history += [*ids, 11, 12 + turn]


def test_an_edit_in_the_middle_costs_what_follows_it() -> None:
    engine = make(ScriptedModel(countdown(3)), context=1000, commit_chunk=64)
    prompt = [5 + n % 10 for n in range(400)]
    engine.submit(long_request("a", prompt))
    run(engine)
    for place in (399, 250, 1):
        edited = [*prompt[:place], 19, *prompt[place + 1 :]]
        engine.submit(long_request("b", edited))
        assert finished(checked(engine), "b").usage.cached_tokens == place


def test_a_prompt_that_is_all_there_needs_no_commit() -> None:
    model = ScriptedModel(countdown(3))
    engine = make(model, context=300)
    engine.submit(request("a"))
    first = reply(run(engine))[0]
    model.commits.clear()
    engine.submit(request("b"))
    engine.step()
    assert (model.commits, model.passes) == ([], 3), "the canvas opened at once"
    ids, end = reply(run(engine), "b")
    assert (ids, end.usage.cached_tokens) == (first, 3)


def test_cancelling_frees_slot_and_pages_within_a_step() -> None:
    engine = make(ScriptedModel(countdown(10_000)), context=640, slots=2, commit_chunk=64)
    engine.submit(long_request("a", [5] * 300))
    engine.submit(long_request("b", [6] * 300))
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    engine.cancel("b")
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == ((), ())
    assert [pool.held for pool in stats.pools.values()] == [0, 0]
    engine._seating.check_integrity()


def test_replies_that_outgrow_the_memory_take_turns_and_are_the_same_as_alone() -> None:
    """Pages for one context only: the youngest loses its slot and goes on later, where it was."""
    requests = [long_request(name, [token] * 60, max_tokens=200, seed=token) for name, token in (("a", 5), ("b", 9))]
    alone = {}
    for each in requests:
        engine = make(ScriptedModel(), context=270, slots=2)
        engine.submit(each)
        alone[each.id] = reply(run(engine, 5000), each.id)[0]
    engine = make(ScriptedModel(), context=270, slots=2, pages=5)
    for each in requests:
        engine.submit(each)
    events = checked(engine)
    assert engine.stats().preemptions >= 1
    for name, ids in alone.items():
        assert len(ids) == 200
        assert reply(events, name)[0] == ids
        assert finished(events, name).usage.cached_tokens == 0, "what was found again was its own"
    ends = [event.request_id for event in events if isinstance(event, Finished)]
    assert ends == ["a", "b"], "the one that came first never waits for the other"


def test_a_request_waits_for_pages_and_nobody_overtakes_it() -> None:
    engine = make(ScriptedModel(countdown(10_000)), context=270, slots=3, pages=5)
    engine.submit(long_request("a", [5] * 200, max_tokens=8))
    engine.submit(long_request("big", [6] * 200, max_tokens=8))
    engine.submit(long_request("small", [7], max_tokens=8))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (("a",), ("big", "small"))
    events = checked(engine)
    ends = [event.request_id for event in events if isinstance(event, Finished)]
    assert ends == ["a", "big", "small"] or ends == ["a", "small", "big"], "both fit once a has left"


def test_a_shared_prompt_is_committed_once() -> None:
    """Four choices of one prompt: whoever has its turn goes on from what the others have committed."""
    model = ScriptedModel()
    engine = make(model, context=2000, slots=4, commit_chunk=128)
    prompt = [5 + n % 20 for n in range(1000)]
    for seed in range(4):
        engine.submit(long_request(str(seed), prompt, max_tokens=4, seed=seed))
    checked(engine)
    assert engine.stats().committed_tokens <= 1000 + 3 * PAGE + 4 * 4


def test_the_stats_count() -> None:
    engine = make(ScriptedModel(countdown(3)), context=640, slots=2, commit_chunk=64)
    for name in "abcd":
        engine.submit(long_request(name, [5] * 100))
    engine.step()
    stats = engine.stats()
    assert (stats.slots, stats.running, stats.waiting) == (2, ("a", "b"), ("c", "d"))
    assert stats.pools["full"].held > 0
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens >= 200) == (400, True)
    assert stats.pools["full"].kept > 0


# With the demo model, on a CPU, in float32 and in what it computes in there unless told otherwise

DTYPES = {"float32": torch.float32, "auto": choose_dtype("auto", CPU)}


@pytest.fixture(scope="module", params=DTYPES)
def demo(request: pytest.FixtureRequest) -> Iterator[DiffusionEngine]:
    options = EngineOptions(model=str(DEMO), device="cpu", dtype=request.param, slots=8, progress=False)
    built = DiffusionEngine.from_options(options)
    yield built
    built.close()


def model_of(dtype: torch.dtype, slots: int = 8, chunk: int = 512) -> DiffusionGemma:
    checkpoint = load_checkpoint(DEMO, CPU, dtype, progress=False)
    pool = KVPool(checkpoint.config, slots, 1024, CPU, dtype, chunk=chunk)
    return DiffusionGemma(checkpoint.config, checkpoint.tensors, REFERENCE, pool)


def some_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(200, 2000, (count,), generator=generator).tolist()


def question(text: str) -> tuple[int, ...]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    written = f"<bos><|turn>user\n{text}<turn|>\n<|turn>model\n"
    return tuple(tokenizer.encode(written, add_special_tokens=False).ids)


def commit(model: DiffusionGemma, cache: KVCache, ids: Sequence[int], sizes: Sequence[int]) -> None:
    at = 0
    for number in range(len(ids)):
        if at >= len(ids):
            return
        chunk = ids[at : at + sizes[number % len(sizes)]]
        plan = model.plan([(chunk, cache)], [])
        model.forward(plan, None, None)
        plan.advance()
        cache.record(chunk)
        at += len(chunk)


def logits(model: DiffusionGemma, caches: Sequence[tuple[int, KVCache]], seed: int = 1) -> Tensor:
    """Of canvases of noise on the caches' prefixes."""
    generator = torch.Generator().manual_seed(seed)
    canvases = torch.randint(0, 2048, (8, 64), generator=generator)
    soft = torch.randn(8, 64, 256, generator=generator).to(model.pool.keys[0].dtype)
    slots = [slot for slot, _ in caches]
    out = model.forward(model.plan([], caches), canvases[slots], soft[slots])
    assert out is not None
    return out.clone()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@torch.inference_mode()
def test_logits_do_not_depend_on_how_a_prefix_was_cut_or_where_it_came_from(
    dtype: torch.dtype, one_thread: None
) -> None:
    """Bit by bit: in chunks of any size; on pages of another slot, a copied page at their end; beyond the window."""
    model = model_of(dtype)
    ids = some_ids(333)
    slots = model.pool.slots
    commit(model, slots[0], ids, [512])
    expected = logits(model, [(0, slots[0])])
    for sizes in ([64], [3, 100], [1, 63, 7]):
        slots[1].forget()
        commit(model, slots[1], ids, sizes)
        assert torch.equal(logits(model, [(0, slots[1])]), expected), sizes
    slots[0].reset()
    slots[1].reset()
    assert slots[2].resume(ids) == len(ids)
    assert torch.equal(logits(model, [(0, slots[2])]), expected)
    other = [*ids[:150], *some_ids(40, seed=5)]
    assert slots[3].resume(other) == 150, "from the middle of a page of somebody else"
    commit(model, slots[3], other[150:], [512])
    found = logits(model, [(0, slots[3])])
    fresh = model_of(dtype, 1)
    commit(fresh, fresh.pool.slots[0], other, [512])
    assert torch.equal(logits(fresh, [(0, fresh.pool.slots[0])]), found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@torch.inference_mode()
def test_logits_do_not_depend_on_the_canvases_beside(dtype: torch.dtype, one_thread: None) -> None:
    model = model_of(dtype)
    caches = list(enumerate(model.pool.slots))
    for index, cache in caches:
        commit(model, cache, some_ids(20 + 55 * index, seed=index), [512])
    together = logits(model, caches)
    for index, cache in caches:
        assert torch.equal(logits(model, [(index, cache)])[0], together[index])


def test_the_same_seed_gives_the_same_bytes_alone_and_among_eight(demo: DiffusionEngine, one_thread: None) -> None:
    requests = [
        GenerationRequest(
            id=str(number),
            prompt_ids=question(f"Write a story about {name} and {animal}."),
            max_tokens=66,
            sampling=Sampling(seed=number, temperature=(0.0, 1.0)[number % 2]),
            logprobs=0,
        )
        for number, (name, animal) in enumerate(zip(NAMES * 2, ANIMALS * 2, strict=True))
    ]
    for each in requests:
        demo.submit(each)
    together = checked(demo)
    assert len({event.token_ids for event in together if isinstance(event, CanvasDone)}) > 4
    for each in (requests[0], requests[3]):
        demo.submit(replace(each, id="alone"))
        mine = [event for event in together if event.request_id == each.id]
        for one, other in zip(checked(demo), mine, strict=True):
            if isinstance(one, CanvasDone):
                assert replace(one, request_id=each.id) == other, "log-probabilities included"


def test_memory_does_not_grow_with_traffic(demo: DiffusionEngine, one_thread: None) -> None:
    model = demo.parts.model
    assert isinstance(model, DiffusionGemma)
    before = [keys.data_ptr() for keys in model.pool.keys], demo.info.kv_bytes
    for number in range(12):
        demo.submit(
            GenerationRequest(
                id=str(number),
                prompt_ids=(2, *some_ids(300, seed=number)),
                max_tokens=10,
                sampling=Sampling(seed=number),
                schedule=Schedule(max_denoising_steps=4),  # a step more takes time and no memory
            )
        )
    checked(demo)
    assert ([keys.data_ptr() for keys in model.pool.keys], model.pool.bytes) == before
    assert [pool.held for pool in demo.stats().pools.values()] == [0, 0]
