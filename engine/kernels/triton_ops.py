"""The op set for NVIDIA GPUs: every op of `reference.Ops` by the kernels of this folder.

Invariant: no op lets the host read anything, and shapes depend on shapes only, so that a pass can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from engine.kernels.attention import ROW_ALIGN, attention
from engine.kernels.experts import experts
from engine.kernels.linears import gated_mlp, linear
from engine.kernels.norms import join_attention, join_layer, qkv_norm_rope_write, rms_norm
from engine.kernels.output import read_logits, soft_embedding
from engine.kernels.reference import Ops
from engine.kernels.routing import route


@cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_by_side(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
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


TRITON = Ops(
    row_align=ROW_ALIGN,
    overlap=side_by_side,
    rms_norm=rms_norm,
    linear=linear,
    qkv_norm_rope_write=qkv_norm_rope_write,
    attention=attention,
    join_attention=join_attention,
    join_layer=join_layer,
    gated_mlp=gated_mlp,
    route=route,
    experts=experts,
    read_logits=read_logits,
    soft_embedding=soft_embedding,
)
