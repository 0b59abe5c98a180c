"""The op set for NVIDIA GPUs: every op of `reference.Ops` by the kernels of this folder.

Invariant: no op lets the host read anything, and shapes depend on shapes only, so that a pass can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import cache, partial

import torch
from torch import Tensor

from engine.kernels import attention_hopper_256, attention_hopper_512
from engine.kernels.attention import ROW_ALIGN, attention
from engine.kernels.chips import HOPPER, chip_of
from engine.kernels.choosing import Choices
from engine.kernels.experts import expert_way_of, experts, experts_order
from engine.kernels.fragments import arrange_experts
from engine.kernels.linears import gated_mlp, linear, order_of, way_of
from engine.kernels.noise import start_canvas
from engine.kernels.norms import join_attention, join_layer, qkv_norm_rope_write, rms_norm
from engine.kernels.operands import PLAIN, Order
from engine.kernels.output import read_logits, soft_embedding
from engine.kernels.readers import Experts, Mlp, Reader
from engine.kernels.reference import Ops
from engine.kernels.routing import route
from engine.kernels.soft_embedding import soft_embedding as sparse_embedding
from engine.kernels.views import AttentionView
from engine.kernels.weights import Weight, plain


@cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_by_side(
    first: Callable[[], Tensor], second: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`first` on a stream of its own while `second` runs on the current one, which then waits for both: what is small
    in one fills the gaps of the other. The interpreter, which has no streams, does one after the other.

    What `first` returns may be used on the current stream only, and freed only after its use there was enqueued: its
    memory is then not taken again before, because the next `first` waits for the current stream.
    """
    if not torch.cuda.is_available():
        return first(), second()
    current = torch.cuda.current_stream()
    side = _side(current.device_index)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        one = first()
    two = second()
    current.wait_stream(side)
    return one, two


def lay_out(weights: MutableMapping[str, Weight]) -> None:
    """Put weights as this chip's kernels want them in the place of those that come otherwise, and in their memory."""
    if torch.cuda.is_available() and chip_of(plain(weights["embedding"]).device) == HOPPER:
        arrange_experts(weights)


def attend(
    heads: Tensor,
    qk_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    view: AttentionView,
    turned: int,
) -> Tensor:
    """As `reference.attend`; all contiguous. Here both steps learn whether queries are folded."""
    folded = attention_hopper_512.serves(heads, qk_weight, keys, turned)
    queries = qkv_norm_rope_write(
        heads, qk_weight, cos, sin, eps, keys, values, view.where, folded_from=turned if folded else None
    )
    if folded:
        return attention_hopper_512.attention(queries, keys, values, view)
    if attention_hopper_256.serves(heads, qk_weight, keys):
        return attention_hopper_256.attention(queries, keys, values, view)
    return attention(queries, keys, values, view)


def by_choice(choices: Choices) -> Ops:
    """The op set as start-up found it fastest on this chip."""

    def orders(reader: Reader, rows: int) -> Order:
        match reader:
            case None:
                return PLAIN
            case Mlp():
                way = way_of(reader.gate_up, rows, choices.linears, gated=True)
                return order_of(reader.gate_up, rows, way, gated=True)
            case Experts():
                return experts_order(reader, expert_way_of(reader, rows, choices.experts))
            case _:
                return order_of(reader, rows, way_of(reader, rows, choices.linears))

    def embed(probabilities: Tensor, embedding: Tensor, scale: float) -> Tensor:
        # rows of one canvas only: whether ids are looked for is then decided by nothing but that canvas
        one = probabilities.shape[0] == choices.sparse_rows
        return (sparse_embedding if one else soft_embedding)(probabilities, embedding, scale)

    return Ops(
        row_align=ROW_ALIGN,
        chosen=choices.told,
        overlap=side_by_side,
        rms_norm=rms_norm,
        linear=partial(linear, chosen=choices.linears),
        qkv_norm_rope_write=qkv_norm_rope_write,
        attend=attend,
        join_attention=partial(join_attention, orders=orders),
        join_layer=partial(join_layer, orders=orders),
        gated_mlp=partial(gated_mlp, chosen=choices.linears),
        route=route,
        experts=partial(experts, ways=choices.experts),
        read_logits=read_logits,
        soft_embedding=embed,
        start_canvas=start_canvas,
    )


TRITON = by_choice(Choices())
