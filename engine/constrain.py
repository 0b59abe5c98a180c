"""A constrained reply: leads each of its canvases to ids that its constraint allows.

After every pass the argmax of the canvas is walked from the left while the constraint allows its ids. If that reaches
an id that ends the reply, or the end of the canvas, the canvas is as good as an unconstrained one and ends as soon as
the model is as sure of it. Otherwise the walk stops at an id that is not allowed: there the likeliest allowed one is
put, everything up to it is pinned, and the rest is denoised around it. Ids that the constraint leaves no choice about
are pinned without waiting for a pass, also before the first.

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

from engine.canvas import Canvas
from engine.denoise import Denoiser
from engine.interface import Constraint, ConstraintError

_WINDOW = 8  # positions behind those pinned in which the text is looked for that belongs behind them
_END_BONUS = 1000  # positions that reaching an end is worth


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
        target = max(due, at + 1 if stuck else 0)
        if target <= self._pinned:
            return
        ids, ended = self._with_forced(self._repaired(canvas, best, target))
        if target > due and not ended:
            self._realign(canvas, best, at, ids)
        self._pin(canvas, ids, ended)

    def _realign(self, canvas: Canvas, best: list[int], broken: int, ids: Sequence[int]) -> None:
        """`ids` are about to be pinned, from position `broken` on against the model's will. What it has behind may
        belong elsewhere then: where it is (the pins replace), behind the pins from `broken` on (they are inserted), or
        from the place on that stands behind the id pinned last. Where the constraint can follow the longest it goes."""
        start = self._pinned + len(ids)
        near = range(broken, min(2 * start - broken + _WINDOW, len(best)))
        behind_last = [place + 1 for place in near if best[place] == ids[-1]]
        chosen, longest = start, -1
        for source in dict.fromkeys((start, broken, broken + 1, *behind_last[:2])):
            walked = self._constraint.advance(best[source:])
            complete = source + walked < len(best) and best[source + walked] in self._constraint.ends()
            self._constraint.rollback(walked)
            if walked + _END_BONUS * complete > longest:
                chosen, longest = source, walked + _END_BONUS * complete
        if chosen != start and start < self._canvas_length:
            self._denoiser.move(canvas, chosen, start)
            self._previous[start:] = best[chosen : chosen + self._canvas_length - start]

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
            chosen = best[at]
            if chosen not in ends:
                chosen = self._denoiser.best_allowed(canvas, at, self._choices(canvas, wanted=chosen))
            ids.append(chosen)
            if chosen in ends:
                break
            if self._constraint.advance([chosen]) != 1:
                raise ConstraintError(f"the constraint allows id {chosen} and refuses it")
        return ids

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
