"""Figures as lines of text, for terminals that have nothing but Python.

Knows figures, no torch. Invariant: every line can be printed as soon as its figure is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.formats import layout
from engine.measure.cards import CARDS
from engine.measure.figure import Detail, Figure
from engine.measure.roofline import pass_work, step_rows, total
from engine.memory_plan import plan_memory
from engine.shapes import Shape, format_choice

COLUMNS = ("figure", "", "or", "device ms", "limit ms", "reached", "GB", "TFLOP")


def cells(figure: Figure) -> tuple[str, ...]:
    """One figure, by COLUMNS: what, how much, the same in another unit, the device's time, the roofline, the share of
    it that is reached, bytes, operations."""
    work = figure.work
    return (
        figure.title,
        "-" if figure.value is None else f"{shown(figure.value)} {figure.unit}",
        figure.note or ("" if figure.also is None else f"{shown(figure.also[0])} {figure.also[1]}"),
        shown(figure.device_milliseconds),
        shown(figure.limit),
        "-" if figure.share is None else f"{100 * figure.share:.0f} %",
        "-" if work is None else shown(work.bytes / 1e9),
        "-" if work is None else shown(work.flops / 1e12),
    )


def line(row: Sequence[str]) -> str:
    """Cells as one line of fixed columns."""
    first, second, third, *others = row
    return f"{first:<52}{second:>16}{third:>24}" + "".join(f"{cell:>11}" for cell in others)


def profile_lines(rows: Iterable[dict[str, Detail]], most: int = 40) -> list[str]:
    """A profile as a table; its last three rows, the sums, are always there."""
    *kernels, whole, busy, wall = rows
    lines = [f"{'kernel':<72}{'calls':>8}{'ms':>12}{'share':>8}"]
    for row in (*kernels[:most], whole, busy, wall):
        share = row["share"]
        part = "-" if not isinstance(share, float) else f"{100 * share:.1f} %"
        lines.append(f"{str(row['name'])[:70]:<72}{row['calls']:>8}{shown(row['milliseconds']):>12}{part:>8}")
    if len(kernels) > most:
        lines.insert(most + 1, f"and {len(kernels) - most} more")
    return lines


def computed_steps(shape: Shape, formats: Sequence[str], prefix: int) -> list[dict[str, Detail]]:
    """The roofline of a denoise step on cards that were not measured, from their makers' figures (`cards`)."""
    rows: list[dict[str, Detail]] = []
    for form in formats:
        stored = layout(shape.config, choice=format_choice(form))
        work = total(pass_work(shape.config, stored, step_rows(shape.config, prefix)))
        plan = plan_memory(shape.config, stored, name=form)
        for card in CARDS:
            rows.append(
                {
                    "card": card.name,
                    "format": form,
                    "milliseconds": 1000 * card.ceilings.seconds(work),
                    "bound": "memory"
                    if work.bytes / card.bandwidth > work.flops / card.matrix_rate / 1e3
                    else "matrix",
                    "context": plan.context(int(card.gigabytes * 1e9)),
                }
            )
    return rows


def computed_lines(rows: Sequence[dict[str, Detail]]) -> list[str]:
    """Cards x formats: milliseconds, with what bounds them; "-" where the format does not fit the card."""
    formats = list(dict.fromkeys(str(row["format"]) for row in rows))
    found = {(row["card"], row["format"]): row for row in rows}
    lines = [f"{'':<20}" + "".join(f"{form:>14}" for form in formats)]
    for card in dict.fromkeys(str(row["card"]) for row in rows):
        line = f"{card:<20}"
        for form in formats:
            row = found[card, form]
            bound = "*" if row["bound"] == "matrix" else " "
            line += f"{shown(row['milliseconds']) + bound if row['context'] else '-':>14}"
        lines.append(line)
    return lines


def shown(value: Detail) -> str:
    """A number in four digits or so."""
    if value is None or isinstance(value, str):
        return value or "-"
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 1000
        else f"{value:.1f}"
        if size >= 100
        else f"{value:.2f}"
        if size >= 1
        else f"{value:.3f}"
    )
