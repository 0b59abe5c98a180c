"""What start-up may compile: every Triton kernel in every configuration, listed so that it can be compiled for chips
that are not here.

Each kernel module has `cases()`, a list of `KernelCase`; `ahead_of_time` compiles one for a chip without a GPU and
says what it needs. Knows no model and launches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel with one set of compile-time constants."""

    name: str  # unique, such as "experts_gate_up[nvfp4,16x128x64]"
    kernel: Any  # the triton.jit or gluon.jit function
    signature: Mapping[str, str]  # argument -> Triton type, such as {"x": "*bf16", "rows": "i32"}
    constants: Mapping[str, Any]  # constexpr argument -> value
    num_warps: int
    num_stages: int = 3  # as Triton takes unasked; of a Gluon kernel nothing, its stages are written out
    most_registers: int | None = None  # of a thread; None: the compiler decides
    chips: tuple[int, ...] = field(default=(80, 86, 89, 90, 100, 120, 121))  # where start-up may choose it
