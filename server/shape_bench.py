"""`easel bench --shape`: a model of random weights measured, as a table for people and one JSON line for programs.

Knows the engine's figures and the terminal; measures nothing itself. Invariant: the last line on stdout is the whole
document, whatever stood above it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engine import (
    FIGURE_COLUMNS,
    BenchOptions,
    Document,
    bench_shape,
    computed_lines,
    computed_steps,
    figure_cells,
    profile_lines,
    shown,
)
from server.config import SettingsError


def run(options: BenchOptions, path: Path | None, *, computed: bool) -> bool:
    """Measure, or with `computed` only count, and print; `path` holds the document so far at any time.

    True if nothing failed. Raises EngineError for what cannot be measured and for a model that does not fit."""
    console = Console(highlight=False)
    if computed:
        _show_computed(options, console)
        return True
    document = _measured(options, Console(stderr=True, highlight=False), path)
    console.print(_head(document.facts), markup=False, soft_wrap=True)
    for found in document.runs:
        console.print(table(found.form, [figure_cells(figure) for figure in found.figures]))
        for name, rows in found.profiles.items():
            console.print("\n".join([f"{found.form}: {name}", *profile_lines(rows), ""]), markup=False, soft_wrap=True)
    print(json.dumps(document.as_json()))
    return not document.failed


def token_count(text: str) -> int:
    """A number of tokens as typed. Raises SettingsError."""
    if not text.isascii() or not text.isdecimal():
        raise SettingsError(f"with --shape, --prompt is a number of tokens, not {text!r}")
    return int(text)


def _measured(options: BenchOptions, progress: Console, path: Path | None) -> Document:
    """The whole document; `progress` hears of each figure at once."""
    for document in bench_shape(options):
        if path is not None:
            document.save(path)
        if document.runs[-1].figures:
            form, latest = document.runs[-1].form, document.runs[-1].figures[-1]
            value, note = figure_cells(latest)[1:3]
            progress.print(f"{form}: {latest.title}: {value}  {note}".rstrip(), markup=False, soft_wrap=True)
    return document


def _show_computed(options: BenchOptions, console: Console) -> None:
    """What cards that are not here would need at the least."""
    prefix = options.prompts[0]
    rows = computed_steps(options)
    console.print(
        f"Computed, not measured: the least ms of a denoise step, prefix {prefix}; * = bound by the matrix units",
        markup=False,
    )
    console.print("\n".join(computed_lines(rows)), markup=False, soft_wrap=True)
    print(json.dumps({"bench": "computed", "shape": options.shape, "prefix": prefix, "steps": rows}))


def table(form: str, rows: Sequence[Sequence[str]]) -> Table:
    """The figures of one format; a column in which nothing stands is left out."""
    drawn = Table(title=form, title_style="bold", title_justify="left", box=SIMPLE, pad_edge=False)
    columns = [
        index for index in range(len(FIGURE_COLUMNS)) if index == 0 or any(row[index] not in ("", "-") for row in rows)
    ]
    for index in columns:
        drawn.add_column(FIGURE_COLUMNS[index], justify="right" if index else "left")
    for row in rows:
        drawn.add_row(*(row[index] for index in columns))
    return drawn


def _head(facts: dict[str, Any]) -> str:
    ceilings = facts["ceilings"]
    bandwidth = max(ceilings["copy_gb_per_second"], ceilings["read_gb_per_second"])
    return (
        f"{facts['shape']}, random weights, on {facts['device']}: {shown(bandwidth)} GB/s and "
        f"{shown(ceilings['matrix_tflops'])} TFLOPS measured · {facts['kernels']} kernels · {facts['dtype']}"
    )
