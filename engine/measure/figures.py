"""Each thing that is measured, one function a figure: what is run, how often, and the work that it is held against.

Knows the rig and the clock; no torch, no engine. Times are medians of wall clock; the device's own time stands beside.

Invariant: every figure is measured on passes that a request would make too, after a warm-up of the same shapes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from engine.formats import Layout
from engine.measure.clock import Clock, typical
from engine.measure.figure import Detail, Figure
from engine.measure.rig import Rig
from engine.measure.roofline import Ceilings, Rows, Work, joined_rows, pass_work, step_rows, total

LAPS = 20
FEW = 3
TURNS = 5
REST = 0.3  # seconds after a prefix: it is kept from earlier, and its commit leaves a device at less than full clock
SECONDS = 4.0  # a figure takes about this long at most; one lap of each is run whatever it takes
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
        laps: Sequence[float],
        work: Work,
        *,
        value: float | None = None,
        unit: str = "ms",
        limit: float | None = None,
        device: float | None = None,
        also: tuple[float, str] | None = None,
        detail: dict[str, Detail] | None = None,
    ) -> Figure:
        """A figure of the median lap; `value` if that is not its milliseconds, `limit` if it is not that of `work`."""
        taken = typical(laps)
        return Figure(
            key=key,
            title=title,
            value=taken if value is None else value,
            unit=unit,
            milliseconds=taken,
            device_milliseconds=device,
            work=work,
            limit=self.limit(work) if limit is None else limit,
            also=also,
            detail={"laps": len(laps), **(detail or {})},
        )


@dataclass(frozen=True)
class Passes:
    """Milliseconds of first passes and of later ones, and a later one's on the device."""

    first: list[float]
    later: list[float]
    device: float | None


def denoise_step(bench: Bench, prefix: int, *, slots: int = 1) -> Passes:
    """Passes over canvases behind `prefix` committed positions, one in each slot."""
    rig, clock, seats = bench.rig, bench.clock, range(slots)
    step = partial(rig.step, seats)
    rig.clear()
    for slot in seats:
        rig.commit(rig.ids(prefix), slot)
    clock.wait()
    time.sleep(REST)
    for _ in range(WARM_UP):
        rig.open(seats)
        step()
        step()
    first: list[float] = []
    later: list[float] = []
    while len(later) < LAPS and sum(first) + sum(later) < 1000 * SECONDS:
        rig.open(seats)
        first.append(clock.lap(step))
        later += clock.laps(step, most=min(bench.steps - 1, LAPS - len(later)), seconds=SECONDS)
    rig.open(seats)
    step()
    return Passes(first, later, clock.device(step, most=5, seconds=SECONDS / 2))


def step_figure(bench: Bench, prefix: int) -> Figure:
    """One denoise pass of one canvas, self-conditioned."""
    passes = denoise_step(bench, prefix)
    parts = pass_work(bench.rig.config, bench.layout, step_rows(bench.rig.config, prefix), itemsize=bench.itemsize)
    detail: dict[str, Detail] = {"first_pass": typical(passes.first), "slowest": max(passes.later)}
    detail |= {f"limit of {part}": bench.limit(work) for part, work in parts.items()}
    return bench.figure(
        f"step@{prefix}",
        f"denoise step, prefix {prefix}",
        passes.later,
        total(parts),
        device=passes.device,
        detail=detail,
    )


def serving_figure(bench: Bench, prefix: int) -> Figure:
    """The same pass by `Engine.step`: what requests, slots and events cost the host."""
    rig = bench.rig
    rig.serve(rig.ids(prefix))
    for _ in range(WARM_UP):
        rig.serving()
    laps = bench.clock.laps(rig.serving, most=LAPS, seconds=SECONDS)
    rig.served()
    work = bench.pass_of(step_rows(rig.config, prefix))
    return bench.figure(f"engine@{prefix}", f"the same by the engine, prefix {prefix}", laps, work)


def canvas_figure(bench: Bench, prefix: int) -> Figure:
    """A canvas from opening to its text, no commit."""
    rig = bench.rig
    rig.clear()
    rig.commit(rig.ids(prefix))
    laps = bench.clock.laps(partial(_canvas, rig, bench.steps), most=FEW, seconds=SECONDS)
    work = bench.canvas_of(step_rows(rig.config, prefix), prefix, bench.steps)
    title = f"canvas of {bench.steps} steps, prefix {prefix}"
    rate = 1000 * rig.config.canvas_length / typical(laps)
    return bench.figure(f"canvas@{prefix}", title, laps, work, also=(rate, "tokens/s"))


def _canvas(rig: Rig, steps: int, commit: Sequence[int] = ()) -> None:
    """A canvas of so many passes, from opening to its text; `commit` goes into the first of them."""
    rig.open()
    rig.step(commit=(commit, 0) if commit else None)
    for _ in range(steps - 1):
        rig.step()
    rig.result()


def commit_figures(bench: Bench, prefix: int) -> list[Figure]:
    """What it costs that a pass commits the last canvas too, and a reply's canvases with their commits."""
    rig, clock, config = bench.rig, bench.clock, bench.rig.config
    size = config.canvas_length
    chunk, prompt = rig.ids(size), rig.ids(prefix)
    joined = partial(rig.step, commit=(chunk, 0))

    def prepare() -> None:
        rig.clear()
        rig.commit(prompt)
        rig.open()

    clock.laps(joined, most=WARM_UP, seconds=SECONDS, prepare=prepare)
    plain = clock.laps(rig.step, most=LAPS // 2, seconds=SECONDS, prepare=prepare)
    plain_device = clock.device(rig.step, most=5, seconds=SECONDS / 2, prepare=prepare)
    both = clock.laps(joined, most=LAPS // 2, seconds=SECONDS, prepare=prepare)
    both_device = clock.device(joined, most=5, seconds=SECONDS / 2, prepare=prepare)
    later = clock.laps(rig.step, most=LAPS // 2, seconds=SECONDS)
    commit = partial(rig.commit, chunk)
    clock.laps(commit, most=WARM_UP, seconds=SECONDS, prepare=prepare)
    alone = clock.laps(commit, most=LAPS // 2, seconds=SECONDS, prepare=prepare)
    first = bench.pass_of(step_rows(config, prefix + size), conditioned=False)
    work = bench.pass_of(joined_rows(config, prefix, size), conditioned=False)
    extra = typical(both) - typical(plain)
    figures = [
        Figure(
            key=f"commit@{prefix}",
            title="extra for the commit in a first pass",
            value=extra,
            unit="ms",
            milliseconds=extra,
            device_milliseconds=None if both_device is None or plain_device is None else both_device - plain_device,
            work=Work(work.bytes - first.bytes, work.flops - first.flops),
            limit=bench.limit(work) - bench.limit(first),
            also=(extra / typical(later), "steps"),
            detail={
                "joined_pass": typical(both),
                "plain_first_pass": typical(plain),
                "commit_alone": typical(alone),
            },
        )
    ]
    prepare()
    laps = clock.laps(partial(_canvas, rig, bench.steps, chunk), most=FEW, seconds=SECONDS)
    work = bench.canvas_of(joined_rows(config, prefix, size), prefix + size, bench.steps)
    rate = 1000 * size / typical(laps)
    title = f"reply, {bench.steps} steps a canvas, commits included"
    figures.append(bench.figure(f"reply@{prefix}", title, laps, work, value=rate, unit="tokens/s"))
    return figures


def first_text_figure(bench: Bench, prompt: int, steps: int) -> Figure:
    """From a prompt's ids to the first canvas's text; the last chunk is committed with the first step."""
    rig, config = bench.rig, bench.rig.config
    *chunks, last = rig.chunks(rig.ids(prompt))

    def reply() -> None:
        for chunk in chunks:
            rig.commit(chunk)
        _canvas(rig, steps, last)

    bench.clock.laps(reply, most=WARM_UP, seconds=SECONDS / 2, prepare=rig.clear)
    laps = bench.clock.laps(reply, most=FEW, seconds=SECONDS, prepare=rig.clear)
    work = bench.canvas_of(joined_rows(config, 0, prompt), prompt, steps)
    return bench.figure(f"first_text@{prompt}/{steps}", f"prompt of {prompt} to first text, {steps} steps", laps, work)


def prefill_figure(bench: Bench, tokens: int) -> Figure:
    """Committing a prompt to an empty slot."""
    rig, clock = bench.rig, bench.clock
    commit = partial(rig.commit, rig.ids(tokens))
    clock.laps(commit, most=WARM_UP, seconds=SECONDS / 2, prepare=rig.clear)
    laps = clock.laps(commit, most=FEW, seconds=SECONDS, prepare=rig.clear)
    device = clock.device(commit, most=FEW, seconds=SECONDS / 2, prepare=rig.clear)
    work = bench.pass_of([Rows(0, tokens, canvas=False)])
    rate = 1000 * tokens / typical(laps)
    title = f"prefill of {tokens} tokens"
    return bench.figure(f"prefill@{tokens}", title, laps, work, value=rate, unit="tokens/s", device=device)


def prefix_figure(bench: Bench, prefix: int, base: int) -> Figure:
    """A step behind a long prefix, and how many steps behind a short one it takes."""
    short = denoise_step(bench, base)
    long = denoise_step(bench, prefix)
    work = bench.pass_of(step_rows(bench.rig.config, prefix))
    also = (typical(long.later) / typical(short.later), f"steps at {base}")
    title = f"denoise step, prefix {prefix}"
    return bench.figure(f"prefix@{prefix}", title, long.later, work, device=long.device, also=also)


def turn_figure(bench: Bench, prefix: int, new: int, steps: int) -> Figure:
    """First text of a turn that brings `new` tokens to a prefix that is kept, and how much longer that takes than with
    no prefix at all."""
    rig, clock = bench.rig, bench.clock
    kept, turn = rig.ids(prefix), rig.ids(new)

    def prepare(ids: Sequence[int]) -> None:
        rig.clear()
        rig.commit(ids)
        clock.wait()
        time.sleep(REST)

    def taken(ids: Sequence[int]) -> list[float]:
        reply, before = partial(_canvas, rig, steps, turn), partial(prepare, ids)
        clock.laps(reply, most=WARM_UP, seconds=SECONDS / 2, prepare=before)
        return clock.laps(reply, most=TURNS, seconds=SECONDS, prepare=before)

    empty, laps = taken(()), taken(kept)
    work = bench.canvas_of(joined_rows(rig.config, prefix, new), prefix + new, steps)
    also = (typical(laps) / typical(empty), "times an empty prefix")
    title = f"turn of {new} behind {prefix} to first text, {steps} steps"
    return bench.figure(f"turn@{prefix}", title, laps, work, also=also)


def slots_figure(bench: Bench, slots: int, prefix: int) -> Figure:
    """One pass over several open canvases."""
    passes = denoise_step(bench, prefix, slots=slots)
    work = bench.pass_of(step_rows(bench.rig.config, prefix, slots=slots))
    title = f"denoise step of {slots} canvas{'es' if slots > 1 else ''}, prefix {prefix}"
    each = (typical(passes.later) / slots, "ms a canvas")
    return bench.figure(f"slots@{slots}", title, passes.later, work, device=passes.device, also=each)


def beside_figure(bench: Bench, prompt: int, prefix: int) -> Figure:
    """A long prompt arrives in slot 1 while slot 0 writes: the step that slot 0 gets, and how long slot 1 waits."""
    rig, clock = bench.rig, bench.clock
    chunks = rig.chunks(rig.ids(prompt), beside=True)
    alone = denoise_step(bench, prefix)
    for chunk in chunks[:WARM_UP]:
        rig.step(commit=(chunk, 1))
    rig.clear()
    rig.commit(rig.ids(prefix))
    laps: list[float] = []
    committed, work = 0, Work()
    for number, chunk in enumerate(chunks):
        if number % bench.steps == 0:
            rig.open()
        laps.append(clock.lap(partial(rig.step, commit=(chunk, 1))))
        work += bench.pass_of(
            [*step_rows(rig.config, prefix), Rows(committed, len(chunk), canvas=False, slot=1)],
            conditioned=number % bench.steps > 0,
        )
        committed += len(chunk)
    each = Work(work.bytes / len(laps), work.flops / len(laps))
    detail: dict[str, Detail] = {
        "step_alone": typical(alone.later),
        "slowest": max(laps),
        "prompt_seconds": sum(laps) / 1000,
    }
    also = (typical(laps) / typical(alone.later), "steps alone")
    title = f"denoise step while a prompt of {prompt} comes in"
    return bench.figure(f"beside@{prompt}", title, laps, each, also=also, detail=detail)
