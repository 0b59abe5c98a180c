"""What Hopper's two attentions in Gluon share: sizes, layouts, what a program's rows see, and how their queries come.

Both have 64 rows a program, of a key head each, tiles of a page, and warp groups that work at their own pace; a warp
group makes the scores of 64 rows alone, and sums 256 columns. Knows views, no model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.chips import HOPPER, chip_of
from engine.pages import PAGE

BM = 64
LOG2_E = gl.constexpr(1.4426950408889634)
BN = gl.constexpr(PAGE)  # a tile is a page
REGISTERS = 240  # of a thread that sums: 128 numbers of it, and a tile's scores
WIDE = gl.NVMMASharedLayout(128, 16, 2)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, SCORES))
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.jit
def sight(low, high, first, rows, GROUP: gl.constexpr, BM: gl.constexpr):
    """What the rows of a program see, from begin to end, [BM] each; the first tile of it, and how many tiles it is; and
    between which positions all rows see all.

    Views promise that low and high never fall within a segment, but for rows that fill it up, its last.
    """
    row = first + gl.arange(0, BM, layout=ROWS) // GROUP
    live = row < rows
    row = gl.where(live, row, first)
    begin = gl.load(low + row)
    end = gl.where(live, gl.load(high + row), 0)
    last = gl.minimum(first + BM // GROUP, rows) - 1
    lowest = gl.load(low + first)
    inner_from = gl.maximum(lowest, gl.load(low + last))
    inner_to = gl.minimum(gl.load(high + first), gl.load(high + last))
    start = lowest // BN
    tiles = gl.maximum((gl.max(end, 0) + BN - 1) // BN - start, 0)
    return begin, end, start, tiles, inner_from, inner_to


@gluon.jit
def hidden(scores, base, begin, end, inner_from, inner_to):
    """The scores of a tile from position `base` on, -inf where a row does not see one."""
    if (base < inner_from) | (base + BN > inner_to):
        position = base + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))[None, :]
        seen = (position >= begin[:, None]) & (position < end[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def calm(best):
    """A row's highest score; 0 for one that has seen nothing yet, so that differences from it are defined."""
    return gl.where(best == float("-inf"), 0.0, best)


@gluon.jit
def by_sums(row, layout: gl.constexpr = SUMS):
    """A number a row [BM] as a column beside sums [BM, columns]."""
    return gl.convert_layout(row, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def places(first, split, rows, heads, head, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """Where the results of a program's rows go in [SPLITS, rows, heads], and which of them are live."""
    lanes = gl.arange(0, BM, layout=layout)
    row = first + lanes // GROUP
    return (split * rows.to(gl.int64) + row) * heads + head * GROUP + lanes % GROUP, row < rows


@gluon.jit
def ask(queries, query, first, rows, heads, head, GROUP: gl.constexpr):
    """Begin to bring the rows' queries to shared memory."""
    BM: gl.constexpr = query.shape[0]
    D: gl.constexpr = query.shape[1]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    asked, _ = places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, COPY))
    asked = gl.minimum(asked, rows.to(gl.int64) * heads - 1)  # beyond the last row: anything, and never stored
    across = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(query, queries + (asked[:, None] * D + across[None, :]))
    async_copy.commit_group()


def takes(heads: Tensor, qk_weight: Tensor, keys: Tensor, columns: int) -> bool:
    """Whether a kernel for so many columns can be run; arguments as in `reference.attend`.

    A fact of shapes and of the chip. The interpreter, on a CPU, does not run Gluon.
    """
    group = qk_weight.shape[0] // keys.shape[2] - 1
    return (
        heads.device.type == "cuda"
        and chip_of(heads.device) == HOPPER
        and heads.dtype == torch.bfloat16
        and keys.shape[3] == columns
        and BM % group == 0
    )


def described(stored: Tensor, columns: int) -> TensorDescriptor:
    """[pages, BN, kv_heads, D] in boxes of so many columns of a page. A captured launch keeps its address: that of the
    memory for keys and values never changes."""
    return TensorDescriptor.from_tensor(stored.flatten(2).flatten(0, 1), [PAGE, columns], WIDE)


def signature(keys: int, values: int) -> dict[str, str]:
    """The types of what both kernels take; keys and values in boxes of so many columns."""
    boxes = {"keys": keys, "values": values}
    return (
        dict.fromkeys(("low", "high", "segment", "table"), "*i32:16")
        | {"queries": "*bf16:16", "out": "*bf16:16"}
        | {name: f"tensordesc<bf16[{PAGE}, {columns}],{WIDE}>" for name, columns in boxes.items()}
        | {"rows": "i32:16", "width": "i32", "heads": "i32:16"}
    )
