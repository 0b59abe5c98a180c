"""Attention over pages against the reference: both kinds of rows, edges of pages and windows, rows that see nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.attention import ROW_ALIGN, attention, tiling
from engine.kernels.chips import SHARED_LIMIT
from engine.kernels.views import NOWHERE, AttentionView, Segment
from engine.pages import PAGE
from tests.engine.kernel_inputs import assert_near, randn

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
CANVAS = 40  # no multiple of ROW_ALIGN, so that rows fill up


def view_of(starts: list[tuple[int, int, bool]], window: int | None, device: torch.device) -> AttentionView:
    """Segments (start, rows, canvas) of one slot each, aligned as kernels want them; pages in a scrambled order."""
    width = max(-(-(start + count) // PAGE) for start, count, _ in starts)
    order = torch.randperm(len(starts) * width, generator=torch.Generator().manual_seed(0)).int()
    low, high, segment, segments = [], [], [], []
    for index, (start, count, canvas) in enumerate(starts):
        segments.append(Segment(len(low), count, uniform=canvas, start=start))
        for row in range(count):
            behind = start if canvas else start + row
            low.append(0 if window is None else max(0, behind - window + 1))
            high.append(start + count if canvas else start + row + 1)
        fill = -count % ROW_ALIGN
        low += [0] * fill
        high += [0] * fill
        segment += [index] * (count + fill)
    ints = {"dtype": torch.int32, "device": device}
    return AttentionView(
        segments=tuple(segments),
        low=torch.tensor(low, **ints),  # type: ignore[call-overload]
        high=torch.tensor(high, **ints),  # type: ignore[call-overload]
        segment=torch.tensor(segment, **ints),  # type: ignore[call-overload]
        table=order.view(len(starts), width).to(device),
        where=torch.full((len(low),), NOWHERE, **ints),  # type: ignore[call-overload]
    )


def inputs(view: AttentionView, heads: int, kv: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    device = view.low.device
    queries = randn(len(view.low), heads, dim, seed=1, device=device, dtype=dtype) * dim**-0.25
    pages = view.table.numel()
    keys, values = (randn(pages, PAGE, kv, dim, seed=seed, device=device, dtype=dtype) for seed in (2, 3))
    return queries, keys * dim**-0.25, values


def with_images(view: AttentionView, *places: tuple[int, int, int]) -> AttentionView:
    """The view with images in its commits: segment, first row and last row + 1 within it. Their rows see all of them,
    as `engine.plan` says."""
    high = view.high.clone()
    for index, begin, end in places:
        segment = view.segments[index]
        high[segment.first + begin : segment.first + end] = segment.start + end
    return AttentionView(**{**vars(view), "high": high})


def real_rows(view: AttentionView) -> list[int]:
    return [row for s in view.segments for row in range(s.first, s.first + s.count)]


SLOTS = {
    "no prefix": [(0, CANVAS, True)],
    "one position before": [(1, CANVAS, True)],
    "a page before": [(PAGE, CANVAS, True)],
    "beyond the window": [(150, CANVAS, True)],
    "chunk from nothing": [(0, 70, False)],
    "chunk across a page and the window": [(PAGE - 3, ROW_ALIGN, False)],
    "one row": [(130, 1, False)],
    "a chunk and two canvases": [(5, 33, False), (2 * PAGE + 1, CANVAS, True), (0, CANVAS, True)],
}


# All but the slots that no window cuts anything off.
CASES = [(name, window) for name in list(SLOTS)[2:] for window in (None, 20, PAGE)]


@pytest.mark.parametrize(("name", "window"), [*((name, PAGE) for name in list(SLOTS)[:2]), *CASES])
def test_attention(name: str, window: int | None, device: torch.device) -> None:
    view = view_of(SLOTS[name], window, device)
    tensors = inputs(view, 4, 2, 16, torch.bfloat16)
    rows = real_rows(view)
    result = attention(*tensors, view)
    assert_near(result[rows], reference.attention(*tensors, view)[rows])
    others = [row for row in range(len(view.low)) if row not in set(rows)]
    assert (result[others] == 0).all(), "rows that fill up see nothing"


IMAGES = {
    "at the beginning": (SLOTS["chunk from nothing"], [(0, 0, 20)]),
    "across a page, and the whole chunk behind": (
        SLOTS["chunk across a page and the window"],
        [(0, 2, 30), (0, 31, ROW_ALIGN)],
    ),
    "one token": (SLOTS["chunk from nothing"], [(0, 5, 6)]),
    "from its middle on, with canvases": (SLOTS["a chunk and two canvases"], [(0, 0, 12), (0, 13, 33)]),
}


@pytest.mark.parametrize("window", [None, PAGE + 2])
@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_an_image(name: str, window: int | None, device: torch.device) -> None:
    """Both op sets against a plain softmax over what each row sees."""
    slots, places = IMAGES[name]
    view = with_images(view_of(slots, window, device), *places)
    queries, keys, values = inputs(view, 2, 1, 16, torch.float32)
    found = {
        "triton": attention(queries, keys, values, view),
        "reference": reference.attention(queries, keys, values, view),
    }
    # a GPU multiplies float32 in tf32: an error of 2**-11 in scores of about 5, and nothing evens it out within one row
    bound = 1e-5 if device.type == "cpu" else 5e-3
    for row in real_rows(view):
        pages = view.table[view.segment[row].long()].long()
        seen = slice(int(view.low[row]), int(view.high[row]))
        own_keys, own_values = (
            stored[pages].flatten(0, 1)[seen].repeat_interleave(2, dim=1) for stored in (keys, values)
        )
        shares = torch.einsum("hd,lhd->hl", queries[row], own_keys).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", shares, own_values).flatten()
        for result in found.values():
            assert_near(result[row], expected, bound)


@pytest.mark.parametrize(("heads", "kv", "dim"), [(8, 1, 32), (2, 2, 64)])
def test_float32_and_other_groups(heads: int, kv: int, dim: int, device: torch.device) -> None:
    view = view_of(SLOTS["a chunk and two canvases"][:2], 50, device)
    tensors = inputs(view, heads, kv, dim, torch.float32)
    rows = real_rows(view)
    bound = 1e-5 if device.type == "cpu" else 2e-3  # a GPU multiplies float32 in tf32
    assert_near(attention(*tensors, view)[rows], reference.attention(*tensors, view)[rows], bound)


def test_a_row_depends_on_its_own_positions_only(device: torch.device) -> None:
    """To the bit: with another neighbour, and with what no row sees overwritten."""
    alone, beside = view_of([(70, CANVAS, True)], 30, device), view_of([(70, CANVAS, True), (9, 64, False)], 30, device)
    queries, keys, values = inputs(beside, 4, 2, 16, torch.bfloat16)
    expected = attention(queries, keys, values, beside)[:CANVAS]
    pages = beside.table[0].long()
    moved = torch.full((alone.table.numel(), *keys.shape[1:]), float("nan"), dtype=keys.dtype, device=device)
    moved_keys, moved_values = moved, moved.clone()
    width = alone.table.shape[1]
    moved_keys[alone.table[0].long()] = keys[pages[:width]]
    moved_values[alone.table[0].long()] = values[pages[:width]]
    rows = len(alone.low)
    assert torch.equal(attention(queries[:rows].contiguous(), moved_keys, moved_values, alone)[:CANVAS], expected)


@pytest.mark.parametrize("place", ["keys", "queries"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e4])
def test_extreme_inputs_stay_in_their_rows(place: str, value: float, device: torch.device) -> None:
    view = view_of([(0, 60, False)], None, device)
    queries, keys, values = inputs(view, 2, 1, 16, torch.float32)
    clean = attention(queries, keys, values, view)
    if place == "keys":
        keys[view.table[0, 0].long(), 50, 0, 3] = value  # seen from row 50 on
    else:
        queries[50, :, 3] = value
    spoiled = attention(queries, keys, values, view)
    assert torch.equal(spoiled[:50], clean[:50])
    if place == "queries":
        assert torch.equal(spoiled[51:], clean[51:])


def test_segments_must_be_aligned(device: torch.device) -> None:
    view = view_of(SLOTS["no prefix"], None, device)
    crooked = AttentionView(**{**vars(view), "segments": (Segment(3, 5, uniform=True, start=0),)})
    with pytest.raises(ValueError, match="multiples of 64"):
        attention(*inputs(view, 2, 1, 16, torch.float32), crooked)


@pytest.mark.parametrize("chip", SHARED_LIMIT)
@pytest.mark.parametrize(("dim", "group"), [(16, 1), (64, 2), (128, 4), (256, 2), (512, 8)])
def test_blocks_divide_what_they_must(chip: int, dim: int, group: int) -> None:
    tile = tiling(dim, group, 2, chip)
    assert tile.BM % group == 0
    assert ROW_ALIGN % (tile.BM // group) == 0
    assert PAGE % tile.BN == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("heads", "kv", "dim", "window"), [(16, 8, 256, 1024), (16, 2, 512, None)])
@pytest.mark.parametrize("prefix", [0, 1, 1022, 1023, 1024, 5000])
@pytest.mark.parametrize("chunk", [128, 512, 2048])
def test_attention_at_full_size(heads: int, kv: int, dim: int, window: int | None, prefix: int, chunk: int) -> None:
    view = view_of([(prefix, chunk, False), (prefix + chunk, 256, True)], window, torch.device("cuda"))
    tensors = inputs(view, heads, kv, dim, torch.bfloat16)
    assert_near(attention(*tensors, view), reference.attention(*tensors, view))
