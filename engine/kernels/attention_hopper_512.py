"""Attention of 512 columns on Hopper, in Gluon: it reads the values, and of the keys only what RoPE turned.

Where values are the keys before their weight and RoPE, and RoPE turns but TURNED columns of each half, a key is
value * weight in all other columns. With queries that were multiplied by that weight (folded, `norms`), scores need the
values and the keys' turned columns only: 640 columns of a position are read instead of 1024, by L2 and by the tensor
cores, and two tiles of 64 positions fit shared memory.

Two warp groups take turns (FlashMLA's "seesaw"). Each makes the scores of every other tile alone. Sums are divided by
columns: warp group 0 keeps the left half, 1 the right. So each multiplies its own odds and the other's, tile by tile in
order, by its half of the tile's values, and while one weighs scores, the other's products run:

    warp group 0 (even tiles)               warp group 1 (odd tiles)
    scores of t                             scores of t + 1
    odds of t, told                         t's odds times right half of t (in flight until the odds are made)
    t's odds times left half of t           odds of t + 1, told
    t + 1's odds times left half of t + 1   t + 1's odds times right half of t + 1

A third partition brings tiles by the bulk tensor copy engine. A tile's place is free again part by part: the right
turned columns after its scores, each half of its values after the one warp group that sums it, and the left turned
columns, in whose place its odds lie, after both. Behind a long prefix that takes a third of the usual kernel's time.

Every wait is for a barrier in shared memory that each turn completes once. Whoever waits has told nothing in between
that could complete it twice: a tile's odds come after its parts, those after what both warp groups told of the tile two
before.

Knows views, no model. Invariant: that of `attention`, among passes of one class of rows (`rows_class`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.attention import join, parts_of, require_aligned
from engine.kernels.attention_hopper import (
    BM,
    BN,
    FLAT,
    LOG2_E,
    REGISTERS,
    ROWS,
    SCORES,
    SUMS,
    WIDE,
    ask,
    by_sums,
    calm,
    described,
    hidden,
    meet,
    places,
    sight,
    signature,
    takes,
)
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER
from engine.kernels.grouped import rows_class
from engine.kernels.launching import launch
from engine.kernels.views import AttentionView

COLUMNS, WARPS = 512, 4
TURNED = gl.constexpr(64)  # columns of each half that RoPE turns
SLACK = gl.constexpr(8.0)
QUARTER = gl.constexpr(128)  # columns of a tile's values that come together
# barriers: of each place 6 for what has come, four quarters of values and these parts of keys
LEFT, RIGHT, COMES = gl.constexpr(4), gl.constexpr(5), gl.constexpr(6)
FREE = gl.constexpr(12)  # of each place 3: what is free, left half, right half, right turned columns
ODDS, ASKED, SUMMED = gl.constexpr(18), gl.constexpr(20), gl.constexpr(21)  # odds by place; queries; totals by group
BARRIERS = gl.constexpr(23)
ALL = gl.constexpr(  # every warp all rows, so that it decides alone what all decide alike
    gl.DistributedLinearLayout([[32]], [[1], [2], [4], [8], [16]], [[0], [0]], [], [64])
)


@gluon.jit
def _barrier():
    """One of its own: between uses of two of an array Triton has the warp group meet."""
    one = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(one, count=1)
    return one


@gluon.jit
def _tell(barriers, one: gl.constexpr):
    """Complete a barrier's turn when the whole warp group has come here."""
    meet()
    mbarrier.arrive(barriers[one], count=1)


@gluon.jit
def _bring_quarter(first, values, head, quarters, barriers, ONE: gl.constexpr, PLACE: gl.constexpr):
    there = barriers[PLACE * COMES + ONE]
    mbarrier.expect(there, QUARTER * BN * 2)
    column = (head * 4 + ONE) * QUARTER
    tma.async_copy_global_to_shared(values, [first, column], there, quarters.index(4 * PLACE + ONE))


@gluon.jit
def _bring_half(first, values, head, quarters, barriers, again, phase, SIDE: gl.constexpr, PLACE: gl.constexpr):
    mbarrier.wait(barriers[FREE + PLACE * 3 + SIDE], phase, pred=again)
    _bring_quarter(first, values, head, quarters, barriers, 2 * SIDE + 1, PLACE)
    _bring_quarter(first, values, head, quarters, barriers, 2 * SIDE, PLACE)


@gluon.jit
def _bring_tile(page, keys, values, head, quarters, turned, barriers, again, phase, PLACE: gl.constexpr):
    """Bring a tile's parts, each when its place is free, in the order in which its scores want them."""
    READY: gl.constexpr = PLACE * COMES
    first = page * BN
    middle: gl.constexpr = 2 * QUARTER
    mbarrier.wait(barriers[FREE + PLACE * 3 + 2], phase, pred=again)
    mbarrier.expect(barriers[READY + RIGHT], TURNED * BN * 2)
    right = turned.index(2 * PLACE + 1)
    tma.async_copy_global_to_shared(keys, [first, head * 4 * QUARTER + middle], barriers[READY + RIGHT], right)
    _bring_half(first, values, head, quarters, barriers, again, phase, PLACE, PLACE)
    _bring_half(first, values, head, quarters, barriers, again, phase, 1 - PLACE, PLACE)
    # both halves are free: both warp groups are done with the odds in this place
    mbarrier.expect(barriers[READY + LEFT], TURNED * BN * 2)
    left = turned.index(2 * PLACE)
    tma.async_copy_global_to_shared(keys, [first, head * 4 * QUARTER], barriers[READY + LEFT], left)


@gluon.jit
def _bring(table, keys, values, head, quarters, turned, barriers, count):
    """The loader's partition."""
    for turn in range((count + 1) // 2):
        again = turn > 0
        phase = (turn + 1) % 2  # of the turn before, which is when a place was used last
        page = gl.load(table + 2 * turn)
        other = gl.load(table + gl.minimum(2 * turn + 1, count - 1))
        _bring_tile(page, keys, values, head, quarters, turned, barriers, again, phase, 0)
        if 2 * turn + 1 < count:
            _bring_tile(other, keys, values, head, quarters, turned, barriers, again, phase, 1)


@gluon.jit
def _part(asked, quarters, barriers, phase, token, ONE: gl.constexpr, OWN: gl.constexpr):
    """Add a quarter's columns, its last ones if `asked` has fewer, when they have come."""
    SKIP: gl.constexpr = QUARTER - asked.shape[1]
    mbarrier.wait(barriers[OWN * COMES + ONE], phase)
    value = quarters.index(4 * OWN + ONE).slice(SKIP, asked.shape[1], dim=1)
    return warpgroup_mma(asked, value.permute((1, 0)), token, is_async=True)


@gluon.jit
def _scores(query, quarters, turned, barriers, phase, OWN: gl.constexpr):
    """Begin the scores of the warp group's tile: turned columns with keys, all others with values."""
    BEGIN: gl.constexpr = 2 * OWN  # with the half of the columns that comes first
    mbarrier.wait(barriers[OWN * COMES + RIGHT], phase)
    nought = gl.full([query.shape[0], BN], 0.0, gl.float32, layout=SCORES)
    asked = query.slice(2 * QUARTER, TURNED, dim=1)
    right = turned.index(2 * OWN + 1).permute((1, 0))
    token = warpgroup_mma(asked, right, nought, use_acc=False, is_async=True)
    asked = query.slice((BEGIN + 1) * QUARTER, QUARTER, dim=1)
    token = _part(asked, quarters, barriers, phase, token, BEGIN + 1, OWN)
    asked = query.slice(BEGIN * QUARTER + TURNED, TURNED, dim=1)
    token = _part(asked, quarters, barriers, phase, token, BEGIN, OWN)
    asked = query.slice((3 - BEGIN) * QUARTER, QUARTER, dim=1)
    token = _part(asked, quarters, barriers, phase, token, 3 - BEGIN, OWN)
    asked = query.slice((2 - BEGIN) * QUARTER + TURNED, TURNED, dim=1)
    token = _part(asked, quarters, barriers, phase, token, 2 - BEGIN, OWN)
    mbarrier.wait(barriers[OWN * COMES + LEFT], phase)
    left = turned.index(2 * OWN).permute((1, 0))
    return warpgroup_mma(query.slice(0, TURNED, dim=1), left, token, is_async=True)


@gluon.jit
def _moved(best, score):
    """What is odds of one after a tile whose highest score is this; best + SLACK is -inf before the first."""
    score *= LOG2_E
    return gl.where(score > best + SLACK, score, best)


@gluon.jit
def _shrunk(acc, best, higher, all_best, all_higher):
    """acc with the new score of odds one, if any row's has moved."""
    moves = gl.max((all_higher > all_best).to(gl.int32), 0)
    shrink = gl.exp2(best - calm(higher))
    if moves != 0:
        acc = acc * by_sums(shrink)
    return acc


@gluon.jit
def _weigh(scores, base, seen, best, total, turned, bests, barriers, OWN: gl.constexpr):
    """Odds of the warp group's tile, to shared memory, and told; returns best, all_best and total with them.

    `best` is a row's score of odds one. It moves only by SLACK or more, so that sums, 128 numbers a thread, are seldom
    shrunk: until then odds are up to 2 ** SLACK.
    """
    begin, end, inner_from, inner_to = seen
    scores = hidden(scores, base, begin, end, inner_from, inner_to)
    higher = _moved(best, gl.max(scores, 1))
    bests[OWN].store(higher)
    meet()  # also: no warp reads this tile's keys any more, in whose place the odds go
    mbarrier.arrive(barriers[FREE + 3 * OWN + 2], count=1)
    all_higher = bests[OWN].load(ALL)
    odds = gl.exp2(scores * LOG2_E - calm(higher)[:, None])
    turned.index(2 * OWN).store(odds.to(gl.bfloat16))
    fence_async_shared()
    _tell(barriers, ODDS + OWN)
    return higher, all_higher, total * gl.exp2(best - calm(higher)) + gl.sum(odds, 1)


@gluon.jit
def _follow(phase, best, all_best, total, acc, bests, barriers, OTHER: gl.constexpr):
    """Wait for the other warp group's odds, and take its best over."""
    mbarrier.wait(barriers[ODDS + OTHER], phase)
    higher = bests[OTHER].load(ROWS)
    all_higher = bests[OTHER].load(ALL)
    acc = _shrunk(acc, best, higher, all_best, all_higher)
    return higher, all_higher, total * gl.exp2(best - calm(higher)), acc


@gluon.jit
def _product(turned, halves, acc, place: gl.constexpr, OWN: gl.constexpr):
    """Begin to add a tile's odds times the warp group's half of its values."""
    return warpgroup_mma(turned.index(2 * place), halves.index(2 * place + OWN), acc, is_async=True)


@gluon.jit
def _other_tile(phase, best, all_best, total, acc, shared, OWN: gl.constexpr):
    """A tile of the other warp group's."""
    _, _, turned, halves, bests, barriers = shared
    OTHER: gl.constexpr = 1 - OWN
    best, all_best, total, acc = _follow(phase, best, all_best, total, acc, bests, barriers, OTHER)
    acc = warpgroup_mma_wait(0, deps=[_product(turned, halves, acc, OTHER, OWN)])
    _tell(barriers, FREE + 3 * OTHER + OWN)
    return best, all_best, total, acc


@gluon.jit
def _even_tile(phase, base, seen, best, all_best, total, acc, shared):
    """A tile of warp group 0's."""
    query, quarters, turned, halves, bests, barriers = shared
    scores = warpgroup_mma_wait(0, deps=[_scores(query, quarters, turned, barriers, phase, 0)])
    higher, all_higher, total = _weigh(scores, base, seen, best, total, turned, bests, barriers, 0)
    acc = _shrunk(acc, best, higher, all_best, all_higher)
    acc = warpgroup_mma_wait(0, deps=[_product(turned, halves, acc, 0, 0)])
    _tell(barriers, FREE)
    return higher, all_higher, total, acc


@gluon.jit
def _two_tiles(phase, base, seen, best, all_best, total, acc, shared):
    """A tile of warp group 0's and the following one, by warp group 1."""
    query, quarters, turned, halves, bests, barriers = shared
    scores = _scores(query, quarters, turned, barriers, phase, 1)
    best, all_best, total, acc = _follow(phase, best, all_best, total, acc, bests, barriers, 0)
    product = _product(turned, halves, acc, 0, 1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    higher, all_higher, total = _weigh(scores, base, seen, best, total, turned, bests, barriers, 1)
    acc = warpgroup_mma_wait(0, deps=[product])
    _tell(barriers, FREE + 1)
    acc = _shrunk(acc, best, higher, all_best, all_higher)
    acc = warpgroup_mma_wait(0, deps=[_product(turned, halves, acc, 1, 1)])
    _tell(barriers, FREE + 4)
    return higher, all_higher, total, acc


@gluon.jit
def _consume(given, OWN: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr):
    """A warp group's partition."""
    queries, low, high, out, parts, sums, rows, heads, head, split, first, count, from_tile = given[:13]
    query, quarters, turned, bests, totals, barriers = given[13:]
    if OWN == 0:
        ask(queries, query, first, rows, heads, head, GROUP)
        async_copy.wait_group(0)
        fence_async_shared()
        _tell(barriers, ASKED)
    else:
        mbarrier.wait(barriers[ASKED], 0)
    begin, end, _, _, inner_from, inner_to = sight(low, high, first, rows, GROUP, BM)
    seen = (begin, end, inner_from, inner_to)
    halves = quarters._reinterpret(gl.bfloat16, [4, BN, 2 * QUARTER], quarters.layout)
    shared = (query, quarters, turned, halves, bests, barriers)
    best = gl.full([BM], float("-inf"), gl.float32, layout=ROWS)
    all_best = gl.full([BM], float("-inf"), gl.float32, layout=ALL)
    total = gl.full([BM], 0.0, gl.float32, layout=ROWS)
    acc = gl.full([BM, 2 * QUARTER], 0.0, gl.float32, layout=SUMS)
    for turn in tl.range(count // 2, disable_licm=True):  # hoisted, the operands' addresses take too many registers
        phase = turn % 2
        base = (from_tile + 2 * turn + OWN) * BN
        if OWN == 0:
            best, all_best, total, acc = _even_tile(phase, base, seen, best, all_best, total, acc, shared)
            best, all_best, total, acc = _other_tile(phase, best, all_best, total, acc, shared, 0)
        else:
            best, all_best, total, acc = _two_tiles(phase, base, seen, best, all_best, total, acc, shared)
    if count % 2 == 1:
        phase = count // 2 % 2
        base = (from_tile + count - 1) * BN
        if OWN == 0:
            best, all_best, total, acc = _even_tile(phase, base, seen, best, all_best, total, acc, shared)
        else:
            best, all_best, total, acc = _other_tile(phase, best, all_best, total, acc, shared, 1)
    totals[OWN].store(total)
    _tell(barriers, SUMMED + OWN)
    mbarrier.wait(barriers[SUMMED + 1 - OWN], 0)
    total += totals[1 - OWN].load(ROWS)
    _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head, GROUP, SPLITS, OWN)


@gluon.jit
def _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head,
               GROUP: gl.constexpr, SPLITS: gl.constexpr, OWN: gl.constexpr):  # fmt: skip
    """Store what the rows' odds come to in half of the columns: to out, or as `attention.attention_kernel` does."""
    BM: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1]
    divisor = gl.where(total == 0.0, 1.0, total)
    acc = acc / by_sums(divisor)
    columns = OWN * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))[None, :]
    place, kept = places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SUMS))
    at = place[:, None] * (2 * HALF) + columns
    if SPLITS == 1:
        gl.store(out + at, acc.to(gl.bfloat16), mask=kept[:, None])
    else:
        gl.store(parts + at, acc, mask=kept[:, None])
        if OWN == 0:
            place, kept = places(first, split, rows, heads, head, GROUP, BM, ROWS)
            gl.store(sums + place, gl.where(total == 0.0, float("-inf"), best + gl.log2(divisor)), mask=kept)


@gluon.jit
def attention_512_kernel(
    queries, keys, values, low, high, segment, table, out, parts, sums, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr, WIDE: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `attention.attention_kernel`, of folded queries; 4 warps, and 8 that work beside them. SPLITS == 1: to out.

    keys, values: descriptors of [pages * BN, kv_heads * D], in boxes of TURNED and of QUARTER columns of a page.
    """
    head = gl.program_id(1)
    split = gl.program_id(2)
    first = gl.program_id(0) * (BM // GROUP)
    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    quarters = gl.allocate_shared_memory(gl.bfloat16, [8, BN, QUARTER], WIDE)  # of two tiles' values
    turned = gl.allocate_shared_memory(gl.bfloat16, [4, BN, TURNED], WIDE)  # of two tiles, a left and a right part each
    bests = gl.allocate_shared_memory(gl.float32, [BM], FLAT)
    other_bests = gl.allocate_shared_memory(gl.float32, [BM], FLAT)
    totals = gl.allocate_shared_memory(gl.float32, [BM], FLAT)
    other_totals = gl.allocate_shared_memory(gl.float32, [BM], FLAT)
    barriers = ()
    for _ in gl.static_range(BARRIERS):
        barriers = barriers + (_barrier(),)  # type: ignore[assignment]  # noqa: RUF005, Triton's language has no stars
    fence_async_shared()
    meet()
    _, _, start, tiles, _, _ = sight(low, high, first, rows, GROUP, BM)
    from_tile = start + tiles * split // SPLITS
    count = start + tiles * (split + 1) // SPLITS - from_tile
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile
    given = (
        queries, low, high, out, parts, sums, rows, heads, head, split, first, count, from_tile,
        query, quarters, turned, (bests, other_bests), (totals, other_totals), barriers,
    )  # fmt: skip
    # The loader is the default partition: as such a warp group would get fewer registers than it needs.
    gl.warp_specialize(
        [
            (_bring, (pages, keys, values, head, quarters, turned, barriers, count)),
            (_consume, (given, 0, GROUP, BM, SPLITS)),
            (_consume, (given, 1, GROUP, BM, SPLITS)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def serves(heads: Tensor, qk_weight: Tensor, keys: Tensor, turned: int) -> bool:
    """Whether `attention` may take the place of the usual one; arguments as in `reference.attend`."""
    values_are_keys = heads.shape[1] == qk_weight.shape[0]
    return takes(heads, qk_weight, keys, COLUMNS) and values_are_keys and turned == TURNED.value


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """As `attention.attention`, of folded queries, where `serves` says so."""
    rows, heads, columns = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    require_aligned(view)
    splits = 1 if rows_class(rows) > 512 else 2  # a prompt's many rows are programs enough (LOG.md)
    out = torch.empty_like(queries)
    parts, sums = parts_of(out, splits)
    launch(attention_512_kernel, (triton.cdiv(rows, BM // group), kv_heads, splits))(
        queries, described(keys, TURNED.value), described(values, QUARTER.value),
        view.low, view.high, view.segment, view.table, out, parts, sums,
        rows, view.table.shape[1], heads,
        GROUP=group, D=columns, BM=BM, SPLITS=splits, WIDE=WIDE, REGISTERS=REGISTERS, num_warps=WARPS,
    )  # fmt: skip
    join(parts, sums, out, splits)
    return out.flatten(1)


def cases() -> list[KernelCase]:
    """At the model's shapes: 16 heads, 2 key heads."""
    return [
        KernelCase(
            name=f"attention_hopper[{COLUMNS}x{splits}]",
            kernel=attention_512_kernel,
            signature=signature(TURNED.value, QUARTER.value) | {"parts": "*fp32:16", "sums": "*fp32:16"},
            constants={
                "GROUP": 8, "D": COLUMNS, "BM": BM, "SPLITS": splits, "WIDE": WIDE, "REGISTERS": REGISTERS,
            },
            num_warps=WARPS,
            chips=(HOPPER,),
        )
        for splits in (1, 2)
    ]  # fmt: skip
