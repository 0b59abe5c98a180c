"""Rows of x as the products take them: as they are, with columns in the order in which weights are decoded, in 8 bit.

Norms write them so at once where they know the reader; everybody else's rows are made so by `taken`, to the same bits.
Knows forms of weights, no ways to multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.grouped import BLOCK, EightBit, Given, order_form
from engine.kernels.readers import Reader
from engine.kernels.rounding import round_rows
from engine.kernels.tiles import ordered
from engine.kernels.weights import FRAGMENT


class Order(NamedTuple):
    """How rows come: `e4m3` is in 8 bit, `plain` as they are, else in the order of `tiles.ordered`."""

    form: str
    block: int

    @property
    def of_columns(self) -> Order:
        """The same, of rows that are rounded later: that moves no columns."""
        return PLAIN if self.form == "e4m3" else self


PLAIN = Order("plain", BLOCK)
EIGHT_BIT = Order("e4m3", BLOCK)
FRAGMENTS = Order("fragment", FRAGMENT)


def order_for(form: str, block: int) -> Order:
    """How rows come for weights of a form that are decoded `block` columns at a time."""
    if form == "plain":
        return PLAIN
    if form == "e4m3":
        return EIGHT_BIT
    return Order(order_form(form), block)


@dataclass(frozen=True)
class Ordered:
    """Rows whose columns are in an order already."""

    values: Tensor  # [R, K]
    order: Order


Operand = Tensor | Ordered | EightBit
Orders = Callable[[Reader, int], Order]  # how a reader takes so many rows


def values_of(x: Operand) -> Tensor:
    """What x holds, [R, K]."""
    return x if isinstance(x, Tensor) else x.values


def unwritten(like: Tensor, order: Order) -> Operand:
    """Memory for rows like those of `like` [R, K]."""
    if order == EIGHT_BIT:
        rows, width = like.shape
        return EightBit(
            like.new_empty(rows, width, dtype=torch.float8_e4m3fn), like.new_empty(rows, dtype=torch.float32)
        )
    values = torch.empty_like(like)
    return values if order == PLAIN else Ordered(values, order)


def taken(x: Operand, order: Order) -> Given:
    """x in an order: as it is if it came so. ValueError if it came in another."""
    if isinstance(x, Tensor):
        return round_rows(x) if order == EIGHT_BIT else ordered(x, *order)
    came = x.order if isinstance(x, Ordered) else EIGHT_BIT
    if came != order:
        raise ValueError(f"rows came as {came}, and are taken as {order}")
    return x.values if isinstance(x, Ordered) else x


def plain_rows(x: Operand) -> Tensor:
    """x for a weight that is not quantised. TypeError if it came for another."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected plain rows, not {type(x).__name__}")
    return x
