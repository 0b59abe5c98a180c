"""Who reads the rows that a norm makes, so that an op set can write them as the product that comes next takes them.

What that is, rows in 8 bit or with their columns in another order, is the op set's own affair. Knows weights only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.kernels.weights import Weight


@dataclass(frozen=True)
class Mlp:
    """The two matrices of a gated MLP."""

    gate_up: Weight  # [2I, M], gate rows first
    down: Weight  # [M, I]


@dataclass(frozen=True)
class Experts:
    """The same of a layer's experts, `active` of which are chosen for a row."""

    gate_up: Weight  # [E, 2F, M], gate rows first
    down: Weight  # [E, M, F]
    active: int


# None: somebody who takes them as they are. A single matrix is one that `linear` multiplies by.
Reader = Weight | Mlp | Experts | None


@dataclass(frozen=True)
class Entrance:
    """How rows get to a reader: normed, and times `norm`."""

    norm: Tensor  # float32 [M]
    reader: Reader = None
