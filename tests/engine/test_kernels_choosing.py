"""What start-up chooses: the fastest by a clock that the tests hold, and ops that then go that way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.kernels import choosing, reference
from engine.kernels.choosing import GAIN, Choices, GraphTimer, Run, choose, fastest
from engine.kernels.experts import ExpertWay
from engine.kernels.grouped import CLASSES
from engine.kernels.launching import only_compiling
from engine.kernels.linears import PARTS, Way
from engine.kernels.readers import Mlp
from engine.kernels.triton_ops import TRITON, by_choice
from engine.kernels.weights import Weight
from tests.engine.kernel_inputs import assert_near, randn, random_weight

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
HIDDEN, WIDTH, EXPERTS, VOCAB = 64, 64, 4, 256


def layer_weights(dense: str, experts: str, device: torch.device) -> dict[str, Weight]:
    """Two layers of a tiny model."""
    found: dict[str, Weight] = {"embedding": randn(VOCAB, HIDDEN, device=device)}
    for number in range(2):
        for kind, form, shape in (
            ("qkv", dense, (128, HIDDEN)),
            ("out", dense, (HIDDEN, 128)),
            ("gate_up", dense, (2 * WIDTH, HIDDEN)),
            ("down", dense, (HIDDEN, WIDTH)),
            ("router", "plain", (EXPERTS, HIDDEN)),
            ("expert_gate_up", experts, (EXPERTS, 2 * WIDTH, HIDDEN)),
            ("expert_down", experts, (EXPERTS, HIDDEN, WIDTH)),
        ):
            found[f"layers.{number}.{kind}"] = random_weight(form, *shape, seed=number, device=device)
    return found


class Clock:
    """Times nothing; says what each way takes, by its name, and what it was asked."""

    def __init__(self, taken: dict[str, float], refused: Sequence[str] = (), wrong: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self._taken, self._refused, self._wrong = taken, refused, wrong

    def __call__(self, runs: Sequence[Run]) -> tuple[float, Tensor]:
        way = next(str(part) for part in runs[0].args if isinstance(part, Way | ExpertWay | str))  # type: ignore[attr-defined]
        self.asked.append(way)
        if way in self._refused:
            raise RuntimeError(f"{way} is not for this chip")
        return self._taken.get(way, 10.0), torch.full((2,), 1.2 if way in self._wrong else 1.0)


def chosen(clock: Clock, dense: str, experts: str, device: torch.device, *, eight_bit: bool) -> Choices:
    weights = layer_weights(dense, experts, device)
    return choose(weights, active=2, canvas=8, scale=8.0, eight_bit=eight_bit, time=clock)


@pytest.fixture(autouse=True)
def no_soft_embedding(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "soft" not in request.node.name:
        monkeypatch.setattr(choosing, "_sparse_is_faster", lambda *_: False)


CPU = torch.device("cpu")  # which counts as a chip of 90


def test_the_fastest_is_chosen_for_every_matrix_and_class() -> None:
    clock = Clock({"e4m3 in 3 parts": 5.0, "library": 4.0, "tiles of 32, e4m3": 3.0})
    found = chosen(clock, "fp8", "fp8", CPU, eight_bit=True)
    assert {way.name for way in found.linears.values()} == {"library"}
    assert {(product.out, product.width, product.gated, product.rows) for product in found.linears} == {
        (*sizes, rows)
        for sizes in ((128, 64, False), (64, 128, False), (64, 64, False), (128, 64, True))
        for rows in CLASSES
    }
    assert {mixture.rows for mixture in found.experts} == set(CLASSES)
    assert any("library, 4 us instead of 10" in line for line in found.told)


def test_rows_stay_in_16_bit_unless_the_checkpoint_says_so() -> None:
    clock = Clock({"library": 1.0, "e4m3": 1.0})
    found = chosen(clock, "fp8", "fp8", CPU, eight_bit=False)
    assert not any(way.eight_bit for way in (*found.linears.values(), *found.experts.values()))
    assert not {"library", "e4m3"} & set(clock.asked)


def test_what_is_as_good_as_equal_stays_usual() -> None:
    same = torch.ones(2)
    assert fastest(["a", "b"], {"a": (10.0, same), "b": (10 * (1 - GAIN) + 0.01, same)}.__getitem__, "op", []) == "a"
    three = {"a": (10.0, same), "b": (9.0, same), "c": (9.5, same)}
    assert fastest(["a", "b", "c"], three.__getitem__, "op", []) == "b"


def test_what_is_wrong_on_this_chip_is_passed_over_and_told() -> None:
    found = chosen(Clock({"library": 1.0, "e4m3": 2.0}, wrong=["library"]), "fp8", "plain", CPU, eight_bit=True)
    assert {way.name for way in found.linears.values()} == {"e4m3"}
    assert any("library is wrong here (off by 0.2 of the result)" in line for line in found.told)
    results = {"a": (10.0, torch.ones(2)), "b": (1.0, torch.full((2,), torch.nan))}
    assert fastest(["a", "b"], results.__getitem__, "op", []) == "a"


def test_what_this_chip_refuses_is_passed_over_and_told() -> None:
    found = chosen(Clock({}, refused=["library"]), "fp8", "plain", CPU, eight_bit=True)
    assert {way.name for way in found.linears.values()} == {"e4m3"}
    assert any("library is refused (library is not for this chip)" in line for line in found.told)


def test_where_all_of_8_bit_is_refused_weights_are_decoded() -> None:
    clock = Clock({}, refused=["library", "e4m3", *(f"e4m3 in {parts} parts" for parts in PARTS)])
    found = chosen(clock, "fp8", "plain", CPU, eight_bit=True)
    assert {way.name for way in found.linears.values()} == {"tiles"}


def test_not_everything_may_be_refused() -> None:
    everything = ["tiles", "unpacked", *(f"tiles in {parts} parts" for parts in PARTS)]
    with pytest.raises(RuntimeError, match="not for this chip"):
        chosen(Clock({}, refused=everything), "fp8", "plain", CPU, eight_bit=False)


def test_a_failed_device_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(way: str) -> tuple[float, Tensor]:
        if way == "b":
            raise torch.AcceleratorError("gone")
        return 1.0, torch.ones(1)

    with pytest.raises(torch.AcceleratorError):
        fastest(["a", "b"], timed, "op", [])


def test_plain_dense_layers_leave_nothing_to_choose() -> None:
    found = chosen(Clock({}), "plain", "nvfp4", CPU, eight_bit=False)
    assert not found.linears and len(found.experts) == len(CLASSES)


def watched(monkeypatch: pytest.MonkeyPatch, *, refused: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What becomes of the ways to multiply, in order: ("compiled", way), and by a timer that runs them ("run", way)."""
    seen: list[tuple[str, str]] = []

    def multiply(x: Tensor, weight: Weight, following: Weight, way: Way, *_: object) -> Tensor:
        seen.append(("compiled" if only_compiling() else "run", str(way)))
        if str(way) in refused:
            raise RuntimeError(f"{way} is not for this chip")
        return torch.ones(2)

    monkeypatch.setattr(choosing, "_multiply", multiply)
    monkeypatch.setattr(choosing, "_choose_experts", lambda *_: None)
    return seen


def running(runs: Sequence[Run]) -> tuple[float, Tensor]:
    return 10.0, next(iter([run() for run in runs]))


@pytest.mark.parametrize("refused", [[], ["library"]])
def test_all_that_is_offered_is_compiled_before_any_is_timed(
    refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch, refused=refused)
    weights = layer_weights("fp8", "plain", CPU)
    found = choose(weights, active=2, canvas=8, scale=8.0, eight_bit=True, time=running)
    compiled = [way for state, way in seen if state == "compiled"]
    assert [state for state, _ in seen[: len(compiled)]] == ["compiled"] * len(compiled)
    assert set(compiled) == {way for state, way in seen if state == "run"}
    # what is refused twice is told of once for each product
    assert len([line for line in found.told if "is refused" in line]) == len(refused) * len(found.linears)


def test_a_device_that_fails_while_ways_are_compiled_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*_: object) -> Tensor:
        raise torch.AcceleratorError("gone")

    monkeypatch.setattr(choosing, "_multiply", multiply)
    with pytest.raises(torch.AcceleratorError):
        choose(layer_weights("fp8", "plain", CPU), active=2, canvas=8, scale=8.0, eight_bit=True, time=running)
    assert not only_compiling()


class Runs(Clock):
    """Runs what it says is fast."""

    def __call__(self, runs: Sequence[Run]) -> tuple[float, Tensor]:
        taken = super().__call__(runs)
        if self.asked[-1] in self._taken:
            for run in runs:
                run()
        return taken


@pytest.mark.parametrize("way", ["tiles in 2 parts", "unpacked", "e4m3"])
def test_the_ops_go_the_chosen_way(way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What start-up times runs, and the op set then agrees with the reference."""
    monkeypatch.setattr(choosing, "CLASSES", (256,))
    monkeypatch.setattr(choosing, "_rows", lambda like, rows, width: randn(5, width, device=like.device))
    monkeypatch.setattr(choosing, "_choose_experts", lambda *_: None)
    if way == "e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this chip multiplies no 8-bit floats")
    weights = layer_weights("fp8", "plain", device)
    eight_bit = way == "e4m3"
    found = choose(weights, active=2, canvas=8, scale=8.0, eight_bit=eight_bit, time=Runs({way: 1.0}))
    assert {str(chosen) for chosen in found.linears.values()} == {way}
    ops, x = by_choice(found), randn(5, HIDDEN, device=device)
    qkv, gate_up, down = (weights[f"layers.0.{kind}"] for kind in ("qkv", "gate_up", "down"))
    bound = 6e-2 if way == "e4m3" else 1e-2
    assert_near(ops.linear(x, qkv), reference.linear(x, qkv), bound)
    mlp = Mlp(gate_up, down)
    assert_near(ops.gated_mlp(x, mlp), reference.gated_mlp(x, mlp), bound)
    if way == "e4m3":  # it did go another way than the usual
        assert not torch.equal(ops.linear(x, qkv), TRITON.linear(x, qkv))


def test_sparse_soft_embedding_is_for_one_canvas(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_choose_linears", lambda *_: None)
    monkeypatch.setattr(choosing, "_choose_experts", lambda *_: None)

    class Timer:
        def __init__(self) -> None:
            self.taken = iter([10.0, 5.0])  # the dense way, the sparse one

        def __call__(self, runs: Sequence[Run]) -> tuple[float, Tensor]:
            assert len(runs) == 2  # a canvas that is sure, and one that is not
            sure, _ = (run() for run in runs)
            return next(self.taken), sure

    weights = layer_weights("plain", "plain", device)
    found = choose(weights, active=2, canvas=8, scale=8.0, eight_bit=False, time=Timer())
    assert found.sparse_rows == 8
    seen = []
    monkeypatch.setattr("engine.kernels.triton_ops.sparse_embedding", lambda *_: seen.append("sparse"))
    monkeypatch.setattr("engine.kernels.triton_ops.soft_embedding", lambda *_: seen.append("dense"))
    for rows in (8, 16):
        by_choice(found).soft_embedding(torch.ones(rows, VOCAB), torch.ones(VOCAB, HIDDEN), 1.0)
    assert seen == ["sparse", "dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_timer_tells_long_from_short() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timer = GraphTimer()
    assert timer([lambda: x[:64] + 1] * 4)[0] < timer([lambda: x @ x] * 4)[0]
