"""Hopper's own attentions against the reference, and what they serve. They run on a GPU of capability 9.0 only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import published_config
from engine.kernels import attention_hopper, attention_hopper_256, attention_hopper_512, reference
from engine.kernels.attention import ROW_ALIGN
from engine.kernels.reference import REFERENCE
from engine.kernels.triton_ops import TRITON
from engine.kernels.views import AttentionView
from engine.model.layers import Rope
from engine.pages import PAGE
from tests.engine.kernel_inputs import ON_HOPPER, assert_near, randn
from tests.engine.test_kernels_attention import CANVAS, IMAGES, real_rows, view_of, with_images

HEADS, TURNED, EPS = 16, 64, 1e-6
KEY_HEADS = {256: 8, 512: 2}  # by columns
PREFIXES = [0, 1, 63, 64, 65, 1023, 4097]


@pytest.fixture(params=[pytest.param("cuda", marks=ON_HOPPER)])
def hopper(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=KEY_HEADS)
def columns(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class Inputs:
    """Random queries, keys and values, of 512 columns as the kernel wants them: queries also folded, keys the values
    times a weight where RoPE turns nothing."""

    def __init__(
        self, view: AttentionView, columns: int, heads: int = HEADS, kv: int | None = None, steep: float = 1.0
    ) -> None:
        device, pages = view.low.device, view.table.numel()
        self.op = attention_hopper_256.attention if columns == 256 else attention_hopper_512.attention
        stored = (pages, PAGE, KEY_HEADS[columns] if kv is None else kv, columns)
        self.queries = randn(len(view.low), heads, columns, seed=1, device=device) * (steep * columns**-0.5)
        self.values = randn(*stored, seed=2, device=device)
        self.folded, self.keys = self.queries, randn(*stored, seed=3, device=device)
        self.read = self.keys  # as keys, of folded queries
        if columns == 512:
            is_turned = torch.arange(columns, device=device) % (columns // 2) < TURNED
            weight = 0.5 + torch.rand(columns, generator=torch.Generator().manual_seed(4)).to(device)
            self.folded = torch.where(is_turned, self.queries, (self.queries * weight).bfloat16())
            self.keys = torch.where(is_turned, self.keys, (self.values * weight).bfloat16())
            self.read = torch.where(is_turned, self.keys, self.values)

    def expected(self, view: AttentionView) -> Tensor:
        return reference.attention(self.queries, self.keys, self.values, view)

    def found(self, view: AttentionView) -> Tensor:
        return self.op(self.folded, self.keys, self.values, view)


def check(view: AttentionView, given: Inputs) -> None:
    rows = real_rows(view)
    result = given.found(view)
    assert_near(result[rows], given.expected(view)[rows])
    others = [row for row in range(len(view.low)) if row not in set(rows)]
    assert (result[others] == 0).all(), "rows that fill up see nothing"


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize(("count", "canvas"), [(256, True), (CANVAS, True), (100, False), (1, False), (700, False)])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_behind_a_prefix(
    prefix: int, count: int, canvas: bool, window: int | None, columns: int, hopper: torch.device
) -> None:
    view = view_of([(prefix, count, canvas)], window, hopper)
    check(view, Inputs(view, columns))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("chunk", [33, 800])
def test_several_slots_in_a_pass(chunk: int, window: int | None, columns: int, hopper: torch.device) -> None:
    """In two splits and in one; prefixes are as different as they can be."""
    view = view_of([(5, chunk, False), (129, CANVAS, True), (0, 256, True), (4097, 1, False)], window, hopper)
    check(view, Inputs(view, columns))


@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_an_image(name: str, columns: int, hopper: torch.device) -> None:
    slots, places = IMAGES[name]
    view = with_images(view_of(slots, None, hopper), *places)
    check(view, Inputs(view, columns))


@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 2), (16, 1), (64, 1)])
def test_other_groups(heads: int, kv: int, columns: int, hopper: torch.device) -> None:
    view = view_of([(70, 33, False), (129, CANVAS, True)], None, hopper)
    check(view, Inputs(view, columns, heads, kv))


@pytest.mark.parametrize("canvas", [True, False])
def test_scores_far_apart(canvas: bool, columns: int, hopper: torch.device) -> None:
    """So that a row's best moves in many tiles. What folding rounds moves results then, and is left out here."""
    view = view_of([(1023, 256, canvas)], None, hopper)
    given = Inputs(view, columns, steep=12.0)
    assert_near(given.found(view), reference.attention(given.folded, given.read, given.values, view))


def test_a_row_depends_on_its_own_positions_only(columns: int, hopper: torch.device) -> None:
    """To the bit: with other slots beside it, and with what no row sees overwritten, or not held."""
    start, window = 270, 30
    alone = view_of([(start, CANVAS, True)], window, hopper)
    beside = view_of([(start, CANVAS, True), (9, 64, False), (600, 256, True)], window, hopper)
    given = Inputs(beside, columns)
    expected = given.found(beside)[:CANVAS]
    rows, width = len(alone.low), alone.table.shape[1]
    mine, theirs = alone.table[0].long(), beside.table[0, :width].long()
    moved = [torch.full((width, *given.keys.shape[1:]), torch.nan, device=hopper).bfloat16() for _ in range(2)]
    for to, stored in zip(moved, (given.keys, given.values), strict=True):
        to[mine] = stored[theirs]
    alone.table[0, : (start - window) // PAGE] = -1
    assert torch.equal(given.op(given.folded[:rows], *moved, alone)[:CANVAS], expected)


@pytest.mark.parametrize("place", ["keys", "queries"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e4])
def test_extreme_inputs_stay_in_their_rows(place: str, value: float, columns: int, hopper: torch.device) -> None:
    view = view_of([(0, 70, False)], None, hopper)
    given = Inputs(view, columns)
    clean = given.found(view)
    if place == "keys":
        given.keys[view.table[0, 0].long(), 50, 0, 3] = value  # seen from row 50 on
    else:
        given.folded[50, :, 3] = value
    spoiled = given.found(view)
    assert torch.equal(spoiled[:50], clean[:50])
    assert not torch.equal(spoiled[50], clean[50])
    if place == "queries":
        assert torch.equal(spoiled[51:], clean[51:])


@pytest.mark.parametrize("rows", [256, 1024])
def test_captured(rows: int, columns: int, hopper: torch.device) -> None:
    """A replay reads rows, pages and what they hold as they are then."""
    view = view_of([(200, rows, True)], None, hopper)
    given = Inputs(view, columns)
    given.found(view)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = given.found(view)
    view.high.sub_(70)
    view.table.copy_(view.table.flip(1))
    given.folded.mul_(0.5)
    given.values.copy_(given.values.flip(0))
    graph.replay()
    assert torch.equal(replayed, given.found(view))


@pytest.mark.parametrize("canvas", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_op_is_that_of_the_reference(prefix: int, canvas: bool, columns: int, hopper: torch.device) -> None:
    """From projected heads on, with the prefix written by the same op set."""
    view = view_of([(prefix, 256, canvas)], None, hopper)
    positions = torch.arange(prefix + 256, device=hopper)
    where = (view.table[0].long()[positions // PAGE] * PAGE + positions % PAGE).int()
    view = replace(view, where=where[prefix:])
    kv = KEY_HEADS[columns]
    turned, values = (TURNED, 0) if columns == 512 else (columns // 2, kv)  # values of their own
    heads = randn(prefix + 256, HEADS + kv + values, columns, device=hopper)
    weight = (0.5 + torch.rand(HEADS + kv, columns, generator=torch.Generator().manual_seed(4))).to(hopper)
    weight[:HEADS] *= columns**-0.5
    cos, sin = Rope(columns, 1e6, turned, hopper, torch.bfloat16).rows(positions)
    found = []
    for ops in (TRITON, REFERENCE):
        cached = [torch.zeros(view.table.numel(), PAGE, kv, columns, device=hopper).bfloat16() for _ in range(2)]
        assert attention_hopper.takes(heads, weight, cached[0], columns)
        if prefix:
            before = heads[:prefix], weight, cos[:prefix], sin[:prefix], EPS
            ops.qkv_norm_rope_write(*before, *cached, where[:prefix])
        rows = heads[prefix:], weight, cos[prefix:], sin[prefix:], EPS
        found.append((ops.attend(*rows, *cached, view, turned), *cached))
    for mine, expected in zip(*found, strict=True):
        assert_near(mine, expected)


def test_segments_must_be_aligned(columns: int, device: torch.device) -> None:
    view = view_of([(0, 40, True), (0, 40, True)], None, device)
    crooked = replace(view, segments=tuple(replace(one, first=one.first // 2) for one in view.segments))
    with pytest.raises(ValueError, match=f"multiples of {ROW_ALIGN}"):
        Inputs(view, columns).found(crooked)


def test_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model's layers in bfloat16 on Hopper, and nothing that is not like them."""
    monkeypatch.setattr(attention_hopper, "chip_of", lambda device: 90)
    config = published_config()
    sliding, full = config.layers[0], config.layers[-1]

    def served(
        kv: int = full.kv_heads,
        dim: int = full.head_dim,
        turned: int = full.turned,
        *,
        query_heads: int = config.num_heads,
        values: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> int | None:
        """By the kernel of how many columns."""
        with FakeTensorMode():
            heads = torch.empty(64, query_heads + kv + values, dim, dtype=dtype, device=device)
            weight = torch.empty(query_heads + kv, dim, device=device)
            given = heads, weight, heads.new_empty(3, PAGE, kv, dim)
            if attention_hopper_512.serves(*given, turned):
                return 512
            return 256 if attention_hopper_256.serves(*given) else None

    of_sliding = partial(served, sliding.kv_heads, sliding.head_dim, sliding.turned)
    assert served() == 512
    assert of_sliding(values=sliding.kv_heads) == 256
    assert of_sliding() == 256, "values of their own or not"
    assert served(values=full.kv_heads) is None, "values of their own"
    assert served(turned=128) is None
    assert served(turned=256) is None
    assert served(dim=128) is None
    for one in (served, of_sliding):
        assert one(dtype=torch.float32) is None
        assert one(query_heads=6 * sliding.kv_heads) is None, "64 rows of a program are no whole positions"
        assert one(device="cpu") is None, "the interpreter"
    monkeypatch.setattr(attention_hopper, "chip_of", lambda device: 100)
    assert served() is None, "another chip"
    assert of_sliding() is None, "another chip"
