"""An audit on the disk: audit.json for machines, audit.html for people."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mollm.audit.findings import FAILS_FROM, PASSES_TO, percent
from mollm.audit.run import Audit, CurvePoint
from mollm.report.charts import Curve
from mollm.report.page import environment
from mollm.system.folders import replace_text

JSON_FILE, HTML_FILE = "audit.json", "audit.html"
_COLOURS = ("kl", "forget", "c4", "c6")
"""Of learning rates."""


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
    templates = environment("mollm.audit")
    templates.filters["percent"] = percent
    page: str = templates.get_template("audit.html.jinja").render(
        audit=audit,
        about=about,
        panels=panels(audit.curve),
        limits=(PASSES_TO, FAILS_FROM),
    )
    return page


@dataclass(frozen=True)
class Panel:
    """The curves of one way to teach."""

    title: str
    rates: Mapping[str, str]
    """The colour of each learning rate, by its words."""
    curves: list[Curve]
    compared: bool
    """Whether the retain-only model's are among them."""


def panels(curve: Sequence[CurvePoint]) -> list[Panel]:
    """The relearning curve: for each way to teach a panel, for each rate a line."""
    found = []
    for title in dict.fromkeys(point.setting.partition(", ")[0] for point in curve):
        mine = [point for point in curve if point.setting.partition(", ")[0] == title]
        settings = dict.fromkeys(point.setting for point in mine)
        rates: dict[str, str] = {}
        curves = []
        for setting, colour in zip(settings, itertools.cycle(_COLOURS)):
            label = setting.partition(", ")[2]
            rates[label] = colour
            points = [point for point in mine if point.setting == setting]
            base = [(p.examples, p.retain_only) for p in points if p.retain_only is not None]
            if base:
                curves.append(Curve(f"{label}, retain-only", base, colour, dashed=True))
            curves.append(Curve(label, [(p.examples, p.model) for p in points], colour))
        found.append(Panel(title, rates, curves, any(each.dashed for each in curves)))
    return found
