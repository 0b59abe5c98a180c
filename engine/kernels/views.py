"""What an attention op is told about one pass: where keys and values lie and which of them each row sees.

Knows positions and pages, no model. Built by `engine.plan`, read by every attention op.

Invariant: within a segment `low` and `high` never fall from one row to the next, and every position from the first
row's low to the last row's high lies in a page of the segment's table row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NOWHERE = -1  # `where` of a row that only fills up


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one slot, from position `start` on. `uniform`: they all see the same positions (a canvas).

    Otherwise a row sees what lies before it and itself, and a soft token of an image all of that: `high` of consecutive
    rows that is the same, and not the position behind each.
    """

    first: int
    count: int
    uniform: bool
    start: int


@dataclass(frozen=True)
class AttentionView:
    """What each row of a pass sees in one kind of layer: positions low <= p < high of its slot.

    Shapes: R rows, G segments, W page numbers. The segments are the host's; the rest is on the device.
    """

    segments: tuple[Segment, ...]
    low: Tensor  # int32 [R]
    high: Tensor  # int32 [R]; rows that only fill up see nothing: low = high = 0
    segment: Tensor  # int32 [R]: the row's segment
    table: Tensor  # int32 [G, W]: page w of the segment's slot lies at this page of the pool; -1 where none is held
    where: Tensor  # int32 [R]: page * PAGE + offset, where the row's own key and value are stored, or NOWHERE
