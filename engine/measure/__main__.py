"""`python -m engine.measure`: the bench of `easel bench --shape` with nothing but Python, torch and transformers.

The last line on stdout is one JSON document; with --json it is also in a file, rewritten after every figure, so that a
run that is killed still tells what it found. Invariant: what the user did wrong is one line on stderr and status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.interface import EngineError
from engine.measure.figure import Document
from engine.measure.options import GROUPS, BenchOptions, check
from engine.measure.report import COLUMNS, cells, computed_lines, computed_steps, line, profile_lines
from engine.shapes import FORMAT_CHOICES, SHAPES, shape_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    asked = _parser().parse_args(arguments)
    options = BenchOptions(
        shape=asked.shape,
        formats=tuple(asked.format or BenchOptions.formats),
        steps=asked.steps,
        prompts=tuple(asked.prompt or BenchOptions.prompts),
        slots=tuple(asked.slots or BenchOptions.slots),
        only=tuple(asked.only or GROUPS),
        start_up=asked.start_up,
        profile=asked.profile,
        device=asked.device,
        dtype=asked.dtype,
        kernels=asked.kernels,
        seed=asked.seed,
    )
    try:
        check(options)
        return _computed(options) if asked.computed else _measured(options, asked.json)
    except EngineError as error:
        print(f"engine.measure: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _measured(options: BenchOptions, path: Path | None) -> int:
    from engine.measure.run import bench  # deferred: imports torch

    printed = 0
    document: Document | None = None
    for document in bench(options):
        figures = [(run, figure) for run in document.runs for figure in run.figures]
        if not printed:
            print(json.dumps(document.facts), flush=True)
            print(line(COLUMNS), flush=True)
        for run, figure in figures[printed:]:
            print(line((f"{run.form}: {figure.title}", *cells(figure)[1:])), flush=True)
        printed = len(figures)
        if path is not None:
            document.save(path)
    assert document is not None, "there was a format"
    for run in document.runs:
        for name, rows in run.profiles.items():
            print("\n".join([f"\n{run.form}: {name}", *profile_lines(rows)]))
    print(json.dumps(document.as_json()), flush=True)
    return 1 if document.failed else 0


def _computed(options: BenchOptions) -> int:
    shape = shape_of(options.shape)
    prefix = options.prompts[0]
    rows = computed_steps(shape, options.formats, prefix)
    print(f"computed, not measured: least ms of a denoise step, prefix {prefix}; * = bound by the matrix units")
    print("\n".join(computed_lines(rows)))
    print(json.dumps({"bench": "computed", "shape": options.shape, "prefix": prefix, "steps": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.measure", description="Speed of a model of random weights.")
    add = parser.add_argument
    add("--shape", default="26b-a4b", help=f"{' or '.join(SHAPES)}")
    add("--weights", default="random", choices=["random"], help="what the weights are")
    add("--format", action="extend", nargs="+", metavar="F", help=", ".join(FORMAT_CHOICES))
    add("--steps", type=int, default=BenchOptions.steps, help="denoise passes of a canvas")
    add("--prompt", type=int, action="extend", nargs="+", metavar="N", help="tokens committed before the canvas")
    add("--slots", type=int, action="extend", nargs="+", metavar="N", help="canvases open at a time")
    add("--only", action="extend", nargs="+", metavar="FIGURES", help=", ".join(GROUPS))
    add("--start-up", action="store_true", help="also start with a cold and a warm kernel cache")
    add("--profile", action="store_true", help="kernels by time of one denoise step")
    add("--computed", action="store_true", help="the roofline of cards that are not here; measures nothing")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kernels", default="auto")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="PATH", help="write the document there too, after every figure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
