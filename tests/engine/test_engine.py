"""engine.engine with a scripted model, then engine.options; the real model is in test_generate_parity."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import options as choices
from engine.assemble import buckets, choose_kernels
from engine.engine import DiffusionEngine
from engine.interface import (
    CanvasDone,
    EngineError,
    EngineOptions,
    Event,
    Finished,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
    Sampling,
    Usage,
)
from engine.kernels.reference_canvas import CanvasStart, CanvasState, start_canvas
from engine.kernels.reference_output import Draw, Reading, read_logits
from engine.kv_cache import KVCache
from tests.fakes import engine_info
from tests.scripted_engine import Plan, bare_caches, engine_around

C, V = 4, 40
EOS = 1
CPU = torch.device("cpu")


class ScriptedModel:
    """Deterministic "text": a function of the committed ids decides a canvas, some passes make it sure of it."""

    softcap = 1000.0

    def __init__(self, choose: Callable[[list[int], Tensor], Tensor] | None = None) -> None:
        self.choose = choose or self.text
        self.commits: list[list[int]] = []
        self.passes = 0
        self.fail_commit_of: int | None = None
        self.error: Exception = RuntimeError("kaput")

    def plan(self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[tuple[int, KVCache]]) -> Plan:
        for ids, _ in commits:
            if self.fail_commit_of in ids:
                raise self.error
        return Plan(commits, canvases, C)

    def forward(self, plan: Plan, canvas: Tensor | None, soft: Tensor | None) -> Tensor | None:
        """Like the real one: a pass that fails leaves the caches as they were."""
        logits = None
        if canvas is not None:
            self.passes += 1
            assert canvas.shape == (len(plan.slots), C)
            prefixes = [plan.prefix(cache) for _, cache in plan.canvases]
            logits = torch.stack([self.choose(prefix, ids) for prefix, ids in zip(prefixes, canvas, strict=True)])
        self.commits += [list(ids) for ids, _ in plan.commits]
        return logits

    def embed_soft(self, probabilities: Tensor) -> Tensor:
        return probabilities

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, V).float()

    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None:
        start_canvas(state, slot, start)

    def read(self, logits: Tensor, draw: Draw) -> Reading:
        return read_logits(logits, 1000.0, draw)

    @staticmethod
    def text(committed: list[int], canvas: Tensor) -> Tensor:
        """Ids that depend on the prefix and on the noise of the first pass, like a model asked to be creative."""
        generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(committed, 1)))
        logits = torch.randn(C, V, generator=generator).scatter(1, canvas[:, None], 40.0)
        logits[:, EOS] = -40.0
        return logits


def sure(ids: Sequence[int]) -> Tensor:
    return torch.zeros(C, V).scatter(1, torch.tensor(ids)[:, None], 30.0)


def countdown(until_eos: int) -> Callable[[list[int], Tensor], Tensor]:
    """20, 21, 22, ... continuing the committed ids, with an eos id after `until_eos` of them."""

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        start = sum(token_id >= 20 for token_id in committed)
        ids = [20 + n % 20 if n < until_eos else EOS for n in range(start, start + C)]
        return sure(ids)

    return choose


def make(
    model: ScriptedModel,
    *,
    context: int = 64,
    max_waiting: int = 8,
    commit_chunk: int = 4,
    slots: int = 1,
    pages: int | None = None,
) -> DiffusionEngine:
    return engine_around(
        model,
        bare_caches(slots, context, ahead=max(commit_chunk, C) + C, pages=pages),
        engine_info("scripted", canvas_length=C, context_length=context, vocab_size=V, eos_ids={EOS}),
        steps=5,
        max_waiting=max_waiting,
        commit_chunk=commit_chunk,
    )


def request(name: str = "a", prompt: Sequence[int] = (5, 6, 7), max_tokens: int = 30, **sampling: float):
    sampling.setdefault("seed", 3)
    return GenerationRequest(
        id=name,
        prompt_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
    )


def run(engine: DiffusionEngine, limit: int = 500) -> list[Event]:
    events: list[Event] = []
    for _ in range(limit):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError("the engine does not come to an end")


def reply(events: Sequence[Event], name: str = "a") -> tuple[list[int], Finished]:
    """The ids of one request's canvases, and its only Finished, which must be its last event."""
    *canvases, finished = [event for event in events if event.request_id == name]
    assert isinstance(finished, Finished)
    ids: list[int] = []
    for index, canvas in enumerate(canvases):
        assert isinstance(canvas, CanvasDone)
        assert canvas.index == index
        ids += canvas.token_ids
    return ids, finished


def test_a_reply_of_three_canvases() -> None:
    model = ScriptedModel(countdown(10))
    engine = make(model)
    engine.submit(request())
    ids, finished = reply(run(engine))
    assert ids == list(range(20, 30))
    usage = Usage(prompt_tokens=3, completion_tokens=11, canvases=3, denoise_steps=6)
    assert finished == Finished(request_id="a", reason="stop", usage=usage, stop_id=EOS)
    assert model.commits == [[5, 6, 7], [20, 21, 22, 23], [24, 25, 26, 27], [28, 29, EOS]]


def test_max_tokens_and_context_cut() -> None:
    for max_tokens, context in ((6, 64), (30, 9)):
        engine = make(ScriptedModel(countdown(100)), context=context)
        engine.submit(request(max_tokens=max_tokens))
        ids, finished = reply(run(engine))
        assert ids == [20, 21, 22, 23, 24, 25]
        assert (finished.reason, finished.usage.completion_tokens, finished.error) == ("length", 6, None)


def test_a_step_is_at_most_one_chunk_and_one_pass() -> None:
    model = ScriptedModel(countdown(2))
    engine = make(model, commit_chunk=4)
    engine.submit(request(prompt=range(2, 12)))
    work = []
    while engine.has_work:
        engine.step()
        work.append((len(model.commits), model.passes))
    assert work == [(1, 0), (2, 0), (3, 1), (3, 2), (4, 2)], "at the end the reply itself"


def creative(engine: DiffusionEngine, name: str = "a") -> list[int]:
    ids, finished = reply(run(engine), name)
    assert finished.reason == "length"
    return ids


def test_a_reply_does_not_depend_on_what_else_runs() -> None:
    asked = request("a", prompt=(5, 9, 2), max_tokens=14, seed=77)
    alone = make(ScriptedModel())
    alone.submit(asked)
    expected = creative(alone)
    assert len(expected) == 14

    queued = make(ScriptedModel())
    queued.submit(request("first", prompt=(8, 8, 8, 8, 8, 8), seed=1))
    queued.submit(asked)
    queued.submit(request("last", prompt=(4,), seed=2, max_tokens=5))
    assert creative(queued) == expected

    seasoned = make(ScriptedModel())
    for number in range(20):
        seasoned.submit(request(f"r{number}", prompt=(number + 2,), seed=number, max_tokens=9))
        run(seasoned)
    seasoned.submit(asked)
    assert creative(seasoned) == expected

    beside = make(ScriptedModel(), slots=3)
    beside.submit(request("x", prompt=(8, 8, 8, 8, 8, 8), seed=1))
    beside.submit(asked)
    beside.submit(request("y", prompt=(4,), seed=2, max_tokens=25))
    assert creative(beside) == expected

    other = make(ScriptedModel())
    other.submit(request("a", prompt=(5, 9, 2), max_tokens=14, seed=78))
    assert creative(other) != expected, "the script must depend on the seed, or this shows nothing"


def test_cancel_frees_the_slot_within_a_step() -> None:
    model = ScriptedModel(countdown(1000))
    engine = make(model)
    engine.submit(request("a"))
    engine.submit(request("b"))
    engine.submit(request("c", max_tokens=3))
    engine.step()
    engine.cancel("a")
    engine.cancel("b")
    passes = model.passes
    first = engine.step()
    assert [(event.request_id, event.reason) for event in first if isinstance(event, Finished)] == [
        ("a", "cancelled"),
        ("b", "cancelled"),
    ]
    assert model.passes == passes + 1, "c already runs"
    _, finished = reply(run(engine), "c")
    assert finished.reason == "length"
    assert finished.usage.cached_tokens == 3, "the prompt, from a"
    assert model.commits == [[5, 6, 7], [20, 21, 22]]


def test_cancel_in_the_middle_of_a_prompt_leaves_no_ids_behind() -> None:
    seen: list[list[int]] = []

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        seen.append(list(committed))
        return sure([EOS] * C)

    engine = make(ScriptedModel(choose))
    engine.submit(request("a", prompt=range(2, 22)))
    engine.step()
    engine.cancel("a")
    engine.submit(request("b", prompt=(30, 31)))
    _, finished = reply(run(engine), "b")
    assert finished.reason == "stop"
    assert seen == [[30, 31], [30, 31]]


def test_a_canvas_that_never_converges_ends_the_reply() -> None:
    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        return torch.zeros(C, V) if len(committed) > 3 else sure([20] * C)

    engine = make(ScriptedModel(choose))
    engine.submit(request())
    ids, finished = reply(run(engine))
    assert ids == [20] * C, "only the canvas that converged"
    assert finished.reason == "length"
    assert finished.error is not None
    assert "did not converge" in finished.error
    assert finished.usage == Usage(
        prompt_tokens=3, completion_tokens=4, canvases=1, denoise_steps=12, redrawn_canvases=1
    )


def test_non_finite_logits_end_the_reply_with_an_error() -> None:
    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        return sure([20] * C) * (float("nan") if len(committed) > 3 else 1)

    engine = make(ScriptedModel(choose))
    engine.submit(request())
    ids, finished = reply(run(engine))
    assert ids == [20] * C
    assert finished.reason == "error"
    assert finished.error is not None
    assert "not finite" in finished.error


@pytest.mark.parametrize("place", ["commit", "denoise"])
def test_an_exception_ends_one_request_and_the_others_go_on(place: str, caplog: pytest.LogCaptureFixture) -> None:
    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        if place == "denoise" and 33 in committed:
            raise torch.OutOfMemoryError("no memory")
        return countdown(6)(committed, canvas)

    model = ScriptedModel(choose)
    if place == "commit":
        model.fail_commit_of = 33
    engine = make(model)
    for name, prompt in (("a", (5,)), ("bad", (6, 7, 8, 9, 10, 33)), ("c", (5,))):
        engine.submit(request(name, prompt))
    with caplog.at_level(logging.CRITICAL):
        events = run(engine)
    assert reply(events, "a")[0] == reply(events, "c")[0] != []
    ids, finished = reply(events, "bad")
    assert ids == []
    assert finished.reason == "error"
    assert finished.error == ("RuntimeError: kaput" if place == "commit" else "OutOfMemoryError: no memory")


@pytest.mark.parametrize("what", ["logprobs", "drafts"])
def test_what_fails_behind_a_pass_ends_one_request_too(
    what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(canvas: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    engine = make(ScriptedModel(countdown(6)), slots=3)
    monkeypatch.setattr(engine.parts.denoiser, {"logprobs": "logprobs", "drafts": "accepted"}[what], no_memory)
    asked = {"logprobs": 3} if what == "logprobs" else {"drafts": True}
    for each in (request("a", (5,)), replace(request("bad", (6, 7, 8, 9)), **asked), request("c", (5,))):
        engine.submit(each)
    with caplog.at_level(logging.CRITICAL):
        events = run(engine)
    assert reply(events, "a")[0] == reply(events, "c")[0] != []
    _, finished = reply(events, "bad")
    assert (finished.reason, finished.error) == ("error", "OutOfMemoryError: no memory")
    engine._seating.check_integrity()
    assert {kind: pool.held for kind, pool in engine.stats().pools.items()} == {"full": 0, "sliding": 0}


def test_a_full_disk_below_the_kernels_cache_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/cache/k.cubin")

    engine = make(ScriptedModel())
    engine._info = replace(engine.info, kernels="triton")
    monkeypatch.setattr("engine.engine.warm_up", full)
    with pytest.raises(EngineError, match=r"No space left on device: '/cache/k.cubin': make room .*TRITON_CACHE_DIR"):
        engine.warm_up()


def test_a_broken_device_is_not_hidden() -> None:
    model = ScriptedModel()
    model.fail_commit_of, model.error = 33, torch.AcceleratorError("device-side assert")
    engine = make(model)
    engine.submit(request(prompt=(33,)))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (request(prompt=()), "prompt_ids is empty"),
        (request(prompt=(1, V)), "prompt_ids"),
        (request(prompt=(-1,)), "prompt_ids"),
        (request(max_tokens=0), "max_tokens"),
        (request(seed=2**64), "seed"),
        (request(seed=-1), "seed"),
        (request(temperature=-0.1), "temperature"),
        (request(temperature=float("nan")), "temperature"),
        (request(temperature=float("inf")), "temperature"),
        (request(top_k=-1), "top_k"),
        (request(top_p=1.5), "top_p"),
        (request(min_p=-0.1), "min_p"),
        (request(min_p=float("nan")), "min_p"),
        (request(prompt=[2] * 64), "does not fit"),
    ],
)
def test_refusals_name_the_field_and_queue_nothing(broken: GenerationRequest, named: str) -> None:
    engine = make(ScriptedModel())
    with pytest.raises(EngineError, match=named):
        engine.submit(broken)
    assert not engine.has_work
    assert engine.step() == []


def test_too_long_and_full_have_their_own_classes() -> None:
    engine = make(ScriptedModel(), max_waiting=0)
    with pytest.raises(RequestTooLong):
        engine.submit(request(prompt=[2] * 64))
    engine.submit(request(prompt=[2] * 63))
    with pytest.raises(QueueFull):
        engine.submit(request("b"))


def test_close_drops_everything() -> None:
    engine = make(ScriptedModel())
    engine.submit(request())
    engine.step()
    engine.close()
    engine.close()
    engine.cancel("a")
    assert not engine.has_work
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request("b"))
    with pytest.raises(EngineError, match="closed"):
        engine.step()


def test_auto_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choices.choose_device("auto") == CPU
    for avx512, amx, dtype in (
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx512: value)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        assert choices.choose_dtype("auto", CPU) == dtype
    assert choices.choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_kernels("auto", CPU, torch.float32) == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choices.choose_device("auto") == torch.device("cuda", 0)
    assert choices.choose_device("cuda:1") == torch.device("cuda", 1)
    assert choices.choose_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert choose_kernels("auto", torch.device("cuda", 0), torch.bfloat16) == "triton"
    assert choose_kernels("auto", torch.device("cuda", 0), torch.float32) == "reference"
    with pytest.raises(EngineError, match="only 2"):
        choices.choose_device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(EngineError, match="choose auto, cpu, cuda"):
        choices.choose_device(name)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no usable NVIDIA GPU"):
        choices.choose_device("cuda")


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(EngineError, match=r"float16.*float32 or bfloat16"):
        choices.choose_dtype("float16", CPU)
    with pytest.raises(EngineError, match=r"cuda.*reference or triton"):
        choose_kernels("cuda", CPU, torch.float32)
    with pytest.raises(EngineError, match="need an NVIDIA GPU"):
        choose_kernels("triton", CPU, torch.float32)


def test_buckets_double_and_hold_the_most() -> None:
    assert buckets(1) == (64,)
    assert buckets(512 + 64) == (64, 128, 256, 512, 1024)


@pytest.mark.parametrize("asked", [1, 0, -5, 4097])
def test_context_out_of_range(asked: int) -> None:
    demo = Path(choices.__file__).parent / "demo" / "checkpoint"
    with pytest.raises(EngineError, match=r"context .* outside 2\.\.4096"):
        DiffusionEngine.from_options(EngineOptions(model=str(demo), device="cpu", context_length=asked))


def test_free_memory_of_this_host() -> None:
    assert 2**26 < choices.free_memory(CPU) < 2**50


@pytest.mark.parametrize(
    "field", [{"max_waiting": -1}, {"commit_chunk": 0}, {"slots": 0}, {"slots": 9}, {"kv_memory": 0}]
)
def test_bounds_are_checked_before_loading(field: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=next(iter(field))):
        DiffusionEngine.from_options(EngineOptions(model="no such folder", **field))  # type: ignore[arg-type]
