"""`python -m engine.measure.summary FILE...`: documents of the bench side by side, formats as columns, in Markdown.

For the README and the log: what is printed is what was measured, nothing is typed by hand. Knows the documents only.
Invariant: a figure that a document lacks, or that could not be measured, is "-".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.measure.report import shown


def summary(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: one row a figure, one column a format, with the share of the roofline reached."""
    runs = [run for document in documents for run in document["runs"]]
    keys = dict.fromkeys(key for run in runs for key in run["figures"])
    lines = ["| | " + " | ".join(run["format"] for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for key in keys:
        found = [run["figures"].get(key) for run in runs]
        title = next(figure["title"] for figure in found if figure is not None)
        lines.append(f"| {title} | " + " | ".join(map(_cell, found)) + " |")
    return lines


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    also = figure["also"]
    value = f"{shown(figure['value'])} {figure['unit']}"
    if also is not None:
        value += f" = {shown(also['value'])} {also['unit']}"
    share = (figure["roofline"] or {}).get("share")
    return value + (f" ({100 * share:.0f} %)" if share else "")


def main(paths: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    if not paths:
        print("engine.measure.summary: give at least one JSON file that the bench wrote", file=sys.stderr)
        return 2
    try:
        documents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
        where = dict.fromkeys(f"{document['device']}, torch {document['torch']}" for document in documents)
        lines = summary(documents)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"engine.measure.summary: not a document of the bench: {error}", file=sys.stderr)
        return 2
    print("; ".join(where), *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
