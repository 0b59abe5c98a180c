"""The op set for NVIDIA GPUs: every op of `reference.Ops` by the kernels of this folder.

Invariant: no op lets the host read anything, and shapes depend on shapes only, so that a pass can be captured.
"""

from __future__ import annotations

from engine.kernels.attention import ROW_ALIGN, attention
from engine.kernels.experts import experts
from engine.kernels.linears import gated_mlp, linear
from engine.kernels.norms import join_attention, join_layer, qkv_norm_rope_write, rms_norm
from engine.kernels.reference import Ops
from engine.kernels.reference_output import read_logits, soft_embedding
from engine.kernels.routing import route

TRITON = Ops(
    row_align=ROW_ALIGN,
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
