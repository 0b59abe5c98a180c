"""What came out of measuring: plain data, for tables and for JSON.

Crosses the wall to the server. Knows no torch. Invariant: a figure that could not be measured has no value but a note
that says why; nothing is ever estimated in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.interface import EngineError
from engine.measure.roofline import Work

Detail = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure. `milliseconds`: what it took, held against `limit`, the milliseconds that the roofline gives."""

    key: str  # stable, for scripts: "step@512"
    title: str
    value: float | None
    unit: str
    milliseconds: float | None = None
    device_milliseconds: float | None = None  # None: not on a GPU
    work: Work | None = None
    limit: float | None = None
    also: tuple[float, str] | None = None  # the same in another unit: 0.2 "steps"
    detail: Mapping[str, Detail] = field(default_factory=dict)
    note: str | None = None  # why there is no value
    failed: bool = False  # there is no value for another reason than that this machine cannot give one

    @property
    def share(self) -> float | None:
        """Of the roofline reached: 1 is as fast as the chip allows."""
        return self.limit / self.milliseconds if self.limit is not None and self.milliseconds else None

    def as_json(self) -> dict[str, Any]:
        roofline = None
        if self.work is not None:
            roofline = {
                "bytes": round(self.work.bytes),
                "flops": round(self.work.flops),
                "milliseconds": self.limit,
                "share": self.share,
            }
        return {
            "title": self.title,
            "value": self.value,
            "unit": self.unit,
            "also": None if self.also is None else {"value": self.also[0], "unit": self.also[1]},
            "milliseconds": self.milliseconds,
            "device_milliseconds": self.device_milliseconds,
            "roofline": roofline,
            **self.detail,
            "note": self.note,
        }


@dataclass
class Run:
    """Everything measured of one format."""

    form: str
    facts: dict[str, Detail] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    profiles: dict[str, list[dict[str, Detail]]] = field(default_factory=dict)  # by kind of pass

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"format": self.form, **self.facts}
        found["figures"] = {figure.key: figure.as_json() for figure in self.figures}
        if self.profiles:
            found["profiles"] = self.profiles
        return found


@dataclass
class Document:
    """All of it; grows while measuring."""

    facts: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a figure is missing that should be there."""
        return any(figure.failed for run in self.runs for figure in run.figures)

    def save(self, path: Path) -> None:
        """Write what there is so far, whole or not at all. Raises EngineError."""
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise EngineError(f"{path} cannot be written: {error.strerror or error}; choose another path") from None

    def as_json(self) -> dict[str, Any]:
        return {"bench": "shape", **self.facts, "runs": [run.as_json() for run in self.runs]}
