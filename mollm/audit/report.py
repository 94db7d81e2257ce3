"""An audit on the disk: audit.json for machines, audit.html for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mollm.audit.findings import FAILS_FROM, PASSES_TO, percent
from mollm.audit.run import Audit, CurvePoint
from mollm.system.folders import replace_text

JSON_FILE, HTML_FILE = "audit.json", "audit.html"
_WIDTH, _HEIGHT = 330, 190
_LEFT, _TOP = 40, 12
"""Of a panel of the curve: the area of the plot, and the margins for the numbers."""


def write_json(audit: Audit, about: Mapping[str, Any], folder: Path) -> None:
    """Writes audit.json, also of an audit that is not complete.

    Args:
        audit: What was found.
        about: Models, data and versions.
        folder: Where it goes.
    """
    text = json.dumps(
        audit.to_json() | {"about": dict(about)}, indent=2, ensure_ascii=False, allow_nan=False
    )
    replace_text(folder / JSON_FILE, text + "\n")


def write_html(audit: Audit, about: Mapping[str, Any], folder: Path) -> None:
    """Writes audit.html: one page that needs no other file and holds no row of the data."""
    replace_text(folder / HTML_FILE, render(audit, about))


def render(audit: Audit, about: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("mollm.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("audit.html.jinja").render(
        audit=audit,
        about=about,
        panels=panels(audit.curve),
        width=_LEFT + _WIDTH + 12,
        height=_TOP + _HEIGHT + 40,
        limits=(PASSES_TO, FAILS_FROM),
    )


@dataclass(frozen=True)
class Line:
    """One learning rate in a panel: points of the model and of the retain-only model."""

    label: str
    model: list[tuple[float, float]]
    retain_only: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """The curves of one way to teach, in the units of the picture."""

    title: str
    lines: list[Line]
    xs: list[tuple[float, int]]
    """Where the numbers of examples stand, and these."""
    ys: list[tuple[float, str]]


def panels(curve: Sequence[CurvePoint]) -> list[Panel]:
    """The relearning curve, drawn: for each way to teach a panel, for each rate a line."""
    if not curve:
        return []
    sizes = sorted({point.examples for point in curve})
    reach = math.log(sizes[-1] / sizes[0]) or 1.0

    def x(size: int) -> float:
        return round(_LEFT + _WIDTH * math.log(size / sizes[0]) / reach, 1)

    def y(share: float) -> float:
        return round(_TOP + _HEIGHT * (1 - min(max(share, 0.0), 1.0)), 1)

    found = []
    for title in dict.fromkeys(point.setting.partition(", ")[0] for point in curve):
        mine = [point for point in curve if point.setting.partition(", ")[0] == title]
        lines = []
        for setting in dict.fromkeys(point.setting for point in mine):
            points = [point for point in mine if point.setting == setting]
            base = [(x(p.examples), y(p.retain_only)) for p in points if p.retain_only is not None]
            label = setting.partition(", ")[2]
            lines.append(Line(label, [(x(p.examples), y(p.model)) for p in points], base))
        ticks = [(y(share), percent(share)) for share in (0, 0.25, 0.5, 0.75, 1)]
        found.append(Panel(title, lines, [(x(size), size) for size in sizes], ticks))
    return found
