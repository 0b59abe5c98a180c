"""Each thing that is measured, one function a figure: what is run, how often, and the work that it is held against.

Knows the rig and the clock; no torch, no engine. Times are medians of wall clock; the device's own time stands beside.

Invariant: every figure is measured on passes that a request would make too, after a warm-up of the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from engine.formats import Layout
from engine.measure import clock as timing
from engine.measure.clock import Clock, Lap
from engine.measure.figure import Detail, Figure
from engine.measure.rig import Rig
from engine.measure.roofline import Ceilings, Rows, Work, joined_rows, pass_work, step_rows, total

LAPS = 20
SECONDS = 4.0  # a figure takes about this long at most; one of each is measured whatever it takes
WARM_UP = 3  # the first compiles and the second captures, where there are graphs


@dataclass(frozen=True)
class Bench:
    """What every figure needs."""

    rig: Rig
    clock: Clock
    layout: Layout
    ceilings: Ceilings
    itemsize: int  # of the dtype of what is not quantised
    steps: int

    def pass_of(self, rows: Sequence[Rows], *, conditioned: bool = True) -> Work:
        """The least work of one pass."""
        return total(pass_work(self.rig.config, self.layout, rows, itemsize=self.itemsize, conditioned=conditioned))

    def canvas_of(self, first: Sequence[Rows], prefix: int, steps: int) -> Work:
        """A first pass over the rows `first`, and the others of a canvas behind `prefix` positions."""
        later = self.pass_of(step_rows(self.rig.config, prefix))
        work = self.pass_of(first, conditioned=False)
        return Work(work.bytes + (steps - 1) * later.bytes, work.flops + (steps - 1) * later.flops)

    def limit(self, work: Work) -> float:
        """Milliseconds."""
        return 1000 * self.ceilings.seconds(work)

    def figure(
        self,
        key: str,
        title: str,
        laps: Sequence[Lap],
        work: Work,
        *,
        value: float | None = None,
        unit: str = "ms",
        limit: float | None = None,
        detail: dict[str, Detail] | None = None,
    ) -> Figure:
        """A figure of the median lap; `value` if that is not its milliseconds, `limit` if it is not that of `work`."""
        taken = timing.wall(laps)
        return Figure(
            key=key,
            title=title,
            value=taken if value is None else value,
            unit=unit,
            milliseconds=taken,
            device_milliseconds=timing.device(laps),
            work=work,
            limit=self.limit(work) if limit is None else limit,
            detail={"laps": len(laps), **(detail or {})},
        )


def denoise_step(bench: Bench, prefix: int, *, slots: int = 1) -> tuple[list[Lap], list[Lap]]:
    """First passes and later ones of canvases behind `prefix` committed positions, one in each slot."""
    rig, clock = bench.rig, bench.clock
    seats = range(slots)
    rig.clear()
    for slot in seats:
        rig.commit(rig.ids(prefix), slot)
    rig.open(seats)
    for _ in range(min(WARM_UP, bench.steps)):
        rig.step(seats)
    first: list[Lap] = []
    later: list[Lap] = []

    def canvas() -> None:
        rig.open(seats)
        first.append(clock.lap(lambda: rig.step(seats)))
        wanted = min(bench.steps - 1, LAPS - len(later))
        later.extend(clock.laps(lambda: rig.step(seats), most=wanted, seconds=SECONDS, least=1))

    spent = 0.0
    while len(later) < LAPS and spent < 1000 * SECONDS:
        canvas()
        spent = sum(lap.wall for lap in (*first, *later))
    return first, later


def step_figure(bench: Bench, prefix: int) -> Figure:
    """One denoise pass of one canvas, self-conditioned."""
    first, later = denoise_step(bench, prefix)
    parts = pass_work(bench.rig.config, bench.layout, step_rows(bench.rig.config, prefix), itemsize=bench.itemsize)
    detail: dict[str, Detail] = {"first_pass": timing.wall(first), "slowest": max(lap.wall for lap in later)}
    detail |= {f"limit of {part}": bench.limit(work) for part, work in parts.items()}
    return bench.figure(f"step@{prefix}", f"denoise step, prefix {prefix}", later, total(parts), detail=detail)


def canvas_figure(bench: Bench, prefix: int) -> Figure:
    """A canvas from opening to its text, no commit."""
    rig = bench.rig
    rig.clear()
    rig.commit(rig.ids(prefix))

    def canvas() -> None:
        rig.open()
        for _ in range(bench.steps):
            rig.step()
        rig.result()

    laps = bench.clock.laps(canvas, most=3, seconds=SECONDS)
    work = bench.canvas_of(step_rows(rig.config, prefix), prefix, bench.steps)
    title = f"canvas of {bench.steps} steps, prefix {prefix}"
    rate = 1000 * rig.config.canvas_length / timing.wall(laps)
    return bench.figure(f"canvas@{prefix}", title, laps, work, detail={"tokens_per_second": rate})


def commit_figures(bench: Bench, prefix: int) -> list[Figure]:
    """What it costs that a pass commits the last canvas too, and a reply's canvases with their commits."""
    rig, clock, config = bench.rig, bench.clock, bench.rig.config
    size = config.canvas_length
    chunk = rig.ids(size)

    def prepare() -> None:
        rig.clear()
        rig.commit(rig.ids(prefix))
        rig.open()

    def joined() -> None:
        rig.step(commit=(chunk, 0))

    clock.laps(joined, most=WARM_UP, seconds=SECONDS, prepare=prepare)
    plain = clock.laps(rig.step, most=LAPS // 2, seconds=SECONDS, prepare=prepare)
    both = clock.laps(joined, most=LAPS // 2, seconds=SECONDS, prepare=prepare)
    later = clock.laps(rig.step, most=LAPS // 2, seconds=SECONDS)
    alone = clock.laps(lambda: rig.commit(chunk), most=3, seconds=SECONDS, prepare=prepare)
    first = bench.pass_of(step_rows(config, prefix + size), conditioned=False)
    work = bench.pass_of(joined_rows(config, prefix, size), conditioned=False)
    extra = timing.wall(both) - timing.wall(plain)
    figures = [
        Figure(
            key=f"commit@{prefix}",
            title="extra of the commit in the next canvas's first pass",
            value=extra,
            unit="ms",
            milliseconds=extra,
            work=Work(work.bytes - first.bytes, work.flops - first.flops),
            limit=bench.limit(work) - bench.limit(first),
            detail={
                "steps": extra / timing.wall(later),
                "joined_pass": timing.wall(both),
                "plain_first_pass": timing.wall(plain),
                "commit_alone": timing.wall(alone),
            },
        )
    ]
    prepare()

    def canvas() -> None:
        rig.open()
        joined()
        for _ in range(bench.steps - 1):
            rig.step()
        rig.result()

    laps = clock.laps(canvas, most=3, seconds=SECONDS)
    work = bench.canvas_of(joined_rows(config, prefix, size), prefix + size, bench.steps)
    rate = 1000 * size / timing.wall(laps)
    title = f"reply, {bench.steps} steps a canvas, commits included"
    figures.append(bench.figure(f"reply@{prefix}", title, laps, work, value=rate, unit="tokens/s"))
    return figures


def first_text_figure(bench: Bench, prompt: int, steps: int) -> Figure:
    """From a prompt's ids to the first canvas's text; the last chunk is committed with the first step."""
    rig, config = bench.rig, bench.rig.config
    ids = rig.ids(prompt)

    def reply() -> None:
        *chunks, last = rig.chunks(ids)
        for chunk in chunks:
            rig.commit(chunk)
        rig.open()
        rig.step(commit=(last, 0))
        for _ in range(steps - 1):
            rig.step()
        rig.result()

    bench.clock.laps(reply, most=WARM_UP, seconds=SECONDS / 2, prepare=rig.clear)
    laps = bench.clock.laps(reply, most=3, seconds=SECONDS, prepare=rig.clear)
    work = bench.canvas_of(joined_rows(config, 0, prompt), prompt, steps)
    return bench.figure(f"first_text@{prompt}/{steps}", f"prompt of {prompt} to first text, {steps} steps", laps, work)


def prefill_figure(bench: Bench, tokens: int) -> Figure:
    """Committing a prompt to an empty slot."""
    rig = bench.rig
    ids = rig.ids(tokens)

    def commit() -> None:
        rig.commit(ids)

    bench.clock.laps(commit, most=WARM_UP, seconds=SECONDS / 2, prepare=rig.clear)
    laps = bench.clock.laps(commit, most=3, seconds=SECONDS, prepare=rig.clear)
    work = bench.pass_of([Rows(0, tokens, canvas=False)])
    rate = 1000 * tokens / timing.wall(laps)
    return bench.figure(f"prefill@{tokens}", f"prefill of {tokens} tokens", laps, work, value=rate, unit="tokens/s")


def prefix_figure(bench: Bench, prefix: int, base: int) -> Figure:
    """A step behind a long prefix, and how many steps behind a short one it takes."""
    _, short = denoise_step(bench, base)
    _, later = denoise_step(bench, prefix)
    work = bench.pass_of(step_rows(bench.rig.config, prefix))
    detail: dict[str, Detail] = {f"times_step_at_{base}": timing.wall(later) / timing.wall(short)}
    return bench.figure(f"prefix@{prefix}", f"denoise step, prefix {prefix}", later, work, detail=detail)


def slots_figure(bench: Bench, slots: int, prefix: int) -> Figure:
    """One pass over several open canvases."""
    _, later = denoise_step(bench, prefix, slots=slots)
    work = bench.pass_of(step_rows(bench.rig.config, prefix, slots=slots))
    title = f"denoise step of {slots} canvas{'es' if slots > 1 else ''}, prefix {prefix}"
    each: dict[str, Detail] = {"milliseconds_a_canvas": timing.wall(later) / slots}
    return bench.figure(f"slots@{slots}", title, later, work, detail=each)


def beside_figure(bench: Bench, prompt: int, prefix: int) -> Figure:
    """A long prompt arrives in slot 1 while slot 0 writes: the step that slot 0 gets, and how long slot 1 waits."""
    rig, clock = bench.rig, bench.clock
    ids = rig.ids(prompt)
    denoise_step(bench, prefix)
    for chunk in rig.chunks(ids)[:WARM_UP]:
        rig.step(commit=(chunk, 1))
    _, alone = denoise_step(bench, prefix)
    rig.open()
    laps: list[Lap] = []
    opened = 0
    for chunk in rig.chunks(ids):
        if len(laps) - opened == bench.steps:
            rig.open()
            opened = len(laps)
        laps.append(clock.lap(partial(rig.step, commit=(chunk, 1))))
    committed, work = 0, Work()
    for chunk in rig.chunks(ids):
        rows = [*step_rows(rig.config, prefix), Rows(committed, len(chunk), canvas=False, slot=1)]
        work += bench.pass_of(rows)
        committed += len(chunk)
    limit = bench.limit(work) / len(laps)
    detail: dict[str, Detail] = {
        "step_alone": timing.wall(alone),
        "slowest": max(lap.wall for lap in laps),
        "prompt_seconds": sum(lap.wall for lap in laps) / 1000,
    }
    each = Work(work.bytes / len(laps), work.flops / len(laps))
    title = f"denoise step while a prompt of {prompt} comes in"
    return bench.figure(f"beside@{prompt}", title, laps, each, limit=limit, detail=detail)
