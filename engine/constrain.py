"""A constrained reply: leads each of its canvases to ids that its constraint allows.

After every pass the argmax of the canvas is walked from the left while the constraint allows its ids. If that reaches
an id that ends the reply, or the end of the canvas, the canvas is as good as an unconstrained one and ends as soon as
the model is as sure of it. Otherwise the walk stops at an id that is not allowed: there the likeliest allowed one is
put, everything up to it is pinned, and the rest is denoised around it, moved to where the constraint can follow it: the
model may have left something out, or written too much. As long as it is sure of the rest, the next such place is put
right in the same pass. Ids that the constraint leaves no choice about are pinned without waiting for a pass, also
before the first.

A pin is never taken back, so one is not set in haste: up to the middle of the schedule the walk waits for a model that
is still changing its mind about what comes before. From there on the pins follow a timetable that has every position
pinned at the last pass. Rejected: pinning at every pass from the first, which fixes strings while they are noise.

Knows the constraint's interface and the denoiser's; no grammar, no text.
Invariant: a canvas this ends continues the reply as the constraint allows, and it ends within the schedule's passes.

Shapes: C canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from engine.canvas import Canvas
from engine.denoise import Denoiser
from engine.interface import Constraint, ConstraintError

T = TypeVar("T")

_WINDOW = 8  # positions behind those pinned in which the text is looked for that belongs behind them
_END_BONUS = 1000  # positions that reaching an end is worth
_PROGRESS = 4  # positions that must be right between two that are repaired in the same pass


@dataclass(frozen=True)
class _Draft:
    """What the model has, rearranged: `rows` are the positions at which it was found."""

    ids: list[int]
    entropy: list[float]
    rows: list[int]

    def behind(self, start: int, source: int, length: int) -> _Draft:
        """The same with what stands from `source` on standing from `start` on, cut to a canvas of `length`. What is
        before is of no interest."""

        def moved(values: list[T]) -> list[T]:
            return [*[values[0]] * start, *values[source:]][:length]

        return _Draft(moved(self.ids), moved(self.entropy), moved(self.rows))


class Guide:
    """Where one reply stands in its constraint. Between canvases that is behind everything delivered."""

    def __init__(self, constraint: Constraint, denoiser: Denoiser) -> None:
        self._constraint = constraint
        self._denoiser = denoiser
        self._canvas_length = denoiser.canvas_length
        self._pinned = 0  # positions of the open canvas, from its first on; the constraint stands behind them
        self._ahead = 0  # so many ids of the open canvas the constraint has moved on by
        self._previous: list[int] = []  # the argmax of the pass before
        self._unchanged = 0  # passes in a row that left what counts of it as it was

    def begin(self, canvas: Canvas) -> None:
        """A canvas was opened: pin what it must begin with. That may be all of it, which ends it.

        Raises ConstraintError.
        """
        self._previous, self._unchanged = [], 0
        self._pin(canvas, *self._with_forced([]))

    def leave(self) -> None:
        """The canvas is given up, and perhaps the reply: the constraint goes back to where it was opened."""
        with suppress(ConstraintError):  # one that failed is not used again
            self._constraint.rollback(self._ahead)
        self._pinned = self._ahead = 0

    def follow(self, canvas: Canvas) -> None:
        """A pass over the canvas is done: pin what is to be pinned, end it if that is all. Raises ConstraintError."""
        best, entropy = self._denoiser.found(canvas)
        walked = self._constraint.advance(best[self._pinned :])
        at = self._pinned + walked
        complete = at == len(best) or best[at] in self._constraint.ends()
        if not complete:
            self._unchanged = 0
        elif self._sure(canvas, best[: at + 1], entropy[: at + 1]):
            self._finish(canvas)
            return
        stuck = not complete and self._decided(canvas, best[: at + 1], entropy[:at])
        self._constraint.rollback(walked)
        self._previous = list(best)
        due = self._due(canvas)
        if stuck and at >= due:
            self._repair(canvas, _Draft(best, entropy, list(range(len(best)))), at)
        elif due > self._pinned:
            self._pin(canvas, *self._with_forced(self._repaired(canvas, best, due)))

    def _repair(self, canvas: Canvas, draft: _Draft, at: int) -> None:
        """Pin everything up to position `at` and the likeliest allowed id there, and go on as long as the model is sure
        of what follows: a text in which the same is wrong over and over need not wait for a pass each time."""
        ids: list[int] = []
        while True:
            start = self._pinned + len(ids)
            ids += draft.ids[start:at]
            self._constraint.advance(draft.ids[start:at])
            chosen = self._choice(canvas, draft.rows[at], wanted=draft.ids[at])
            ids, ended = self._with_forced([*ids, chosen])
            start = self._pinned + len(ids)
            if ended or start >= self._canvas_length:
                break
            draft = draft.behind(start, self._resume(draft, at, start, ids[-1]), self._canvas_length)
            walked = self._constraint.advance(draft.ids[start:])
            at = start + walked
            right = at >= len(draft.ids) or draft.ids[at] in self._constraint.ends()
            self._constraint.rollback(walked)
            if right or walked < _PROGRESS or max(draft.entropy[start:at]) > canvas.schedule.entropy_bound:
                break
        if draft.rows[start:] != list(range(start, len(draft.rows))) or len(draft.rows) < self._canvas_length:
            self._denoiser.move(canvas, start, draft.rows[start:])
            self._previous[start:] = draft.ids[start:]
        self._pin(canvas, ids, ended)

    def _resume(self, draft: _Draft, broken: int, start: int, last: int) -> int:
        """Ids are about to be pinned up to `start`, from position `broken` on against the model's will, `last` at the
        end. What the model has behind may belong elsewhere then: where it is (the pins replace), behind the pins from
        `broken` on (they are inserted), or from the place on that stands behind the id pinned last. Where it goes on
        from is where the constraint can follow it the longest."""
        near = range(broken, min(2 * start - broken + _WINDOW, len(draft.ids)))
        behind_last = [place + 1 for place in near if draft.ids[place] == last]
        chosen, longest = start, -1
        for source in dict.fromkeys((start, broken, broken + 1, *behind_last[:2])):
            walked = self._constraint.advance(draft.ids[source:])
            complete = source + walked < len(draft.ids) and draft.ids[source + walked] in self._constraint.ends()
            self._constraint.rollback(walked)
            if walked + _END_BONUS * complete > longest:
                chosen, longest = source, walked + _END_BONUS * complete
        return chosen

    def _sure(self, canvas: Canvas, best: list[int], entropy: list[float]) -> bool:
        """The model's own stop rule, for the part of a canvas that counts: what is behind an end does not."""
        same = self._previous[: len(best)] == best
        self._unchanged = self._unchanged + 1 if same else 0
        mean = sum(entropy) / len(entropy)
        schedule = canvas.schedule
        return mean < schedule.confidence_threshold and self._unchanged >= schedule.stability_threshold

    def _decided(self, canvas: Canvas, best: list[int], before: list[float]) -> bool:
        """The model wants an id that is not allowed, the last of `best`, and will not come off it by itself."""
        if self._previous[: len(best)] == best:
            return True
        return all(each <= canvas.schedule.entropy_bound for each in before[self._pinned :])

    def _due(self, canvas: Canvas) -> int:
        """How many positions must be pinned by now: none in the first half of the passes, then evenly more."""
        left = self._denoiser.passes_left(canvas)
        half = (canvas.schedule.max_denoising_steps + 1) // 2
        return self._canvas_length - self._canvas_length * left // half if left < half else 0

    def _repaired(self, canvas: Canvas, best: Sequence[int], target: int) -> list[int]:
        """Ids for the free positions before `target`: the argmax where it is allowed, else the likeliest allowed.

        The constraint stands behind them afterwards; it may end before `target`.
        """
        ids: list[int] = []
        while (at := self._pinned + len(ids)) < target:
            walked = self._constraint.advance(best[at:target])
            ids += best[at : at + walked]
            at += walked
            if at == target:
                break
            ends = self._constraint.ends()
            ids.append(best[at] if best[at] in ends else self._choice(canvas, at, wanted=best[at]))
            if ids[-1] in ends:
                break
        return ids

    def _choice(self, canvas: Canvas, row: int, *, wanted: int) -> int:
        """What stands in the place of an id that is not allowed, by the logits at position `row`. The constraint moves
        on by it, unless it ends the reply."""
        chosen = self._denoiser.best_allowed(canvas, row, self._choices(canvas, wanted=wanted))
        if chosen not in self._constraint.ends() and self._constraint.advance([chosen]) != 1:
            raise ConstraintError(f"the constraint allows id {chosen} and refuses it")
        return chosen

    def _choices(self, canvas: Canvas, *, wanted: int) -> bytes:
        """What may stand in the place of an id that is not allowed. A model that wants to end is helped to: it would
        fill strings with anything before it thinks of the quote that closes them."""
        if wanted in canvas.schedule.eos_ids or wanted == canvas.schedule.pad_id:
            closing = self._constraint.closing()
            if closing.count(0) != len(closing):
                return closing
        return self._constraint.allowed()

    def _with_forced(self, ids: list[int]) -> tuple[list[int], bool]:
        """Ids for the next free positions and what must follow them, and whether they end the reply."""
        room = self._canvas_length - self._pinned
        ended = bool(ids) and ids[-1] in self._constraint.ends()
        while not ended and len(ids) < room:
            forced = self._constraint.forced()[: room - len(ids)]
            forced = forced[: self._constraint.advance(forced)]
            ids += forced
            if self._constraint.must_end and len(ids) < room:
                ids.append(self._constraint.ends()[0])
                ended = True
            elif not forced:
                break
        return ids, ended

    def _pin(self, canvas: Canvas, ids: list[int], ended: bool) -> None:
        """Pin ids; end the canvas if it is full or the reply ends."""
        if ids:
            self._denoiser.pin(canvas, self._pinned, ids)
            self._previous[self._pinned : self._pinned + len(ids)] = ids
            self._pinned += len(ids)
            self._ahead += len(ids) - ended
        if ended or self._pinned == self._canvas_length:
            self._finish(canvas)

    def _finish(self, canvas: Canvas) -> None:
        self._denoiser.finish(canvas)
        self._pinned = self._ahead = 0
