"""What a run leaves behind beside its model: summary.json, answers.json, figures, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mollm.audit import Audit
from mollm.audit.findings import percent
from mollm.demo.plots import save_figures
from mollm.demo.quiz import Score
from mollm.methods.method import OBJECTIVES
from mollm.report.conflicts import conflict_rate
from mollm.report.page import curves, environment
from mollm.system.folders import replace_text
from mollm.system.tables import aligned
from mollm.training.history import StepRecord, nan_to_none

GROUPS = {
    "forget": "Forget",
    "retain": "Retain",
    "heldout": "Held-out",
    "general": "General",
}


@dataclass(frozen=True)
class DemoRun:
    """A finished run of the demo."""

    summary: dict[str, Any]
    """What summary.json holds."""
    before: Mapping[str, Score]
    """The quiz on each of the GROUPS, by the original model."""
    after: Mapping[str, Score]
    """The same quiz, by the new model."""
    history: Sequence[StepRecord]
    audit: Audit | None = None
    """What the short audit found; where there is none, the summary says why."""


@dataclass(frozen=True)
class Row:
    """One question with the answers before and after."""

    question: str
    accepted: str
    before: str
    before_right: bool
    after: str
    after_right: bool


def conflict_rates(history: Sequence[StepRecord]) -> dict[str, float]:
    """For each objective, the share of the applied updates that did not descend on it."""
    conflicts = [record.conflicts for record in history]
    return {name: conflict_rate(conflicts, name) or 0.0 for name in OBJECTIVES}


def rows(run: DemoRun, group: str) -> list[Row]:
    """The answers of one group, before and after side by side."""
    before, after = run.before[group], run.after[group]
    columns = (before.questions, before.replies, before.right, after.replies, after.right)
    return [
        Row(
            question=question.text,
            accepted=" / ".join(question.accepted),
            before=str(reply_before),
            before_right=right_before,
            after=str(reply_after),
            after_right=right_after,
        )
        for question, reply_before, right_before, reply_after, right_after in zip(
            *columns, strict=True
        )
    ]


def write_run(run: DemoRun, folder: Path) -> None:
    """Writes every file of `run` into `folder` but those of the trainer: model, card, history."""
    _write_json(folder / "summary.json", run.summary)
    answers = {group: [vars(row) for row in rows(run, group)] for group in GROUPS}
    _write_json(folder / "answers.json", answers)
    save_figures(run.history, folder)
    replace_text(folder / "report.html", render(run))


def render(run: DemoRun) -> str:
    """The report as one HTML page that needs no other file."""
    templates = environment("mollm.demo")
    templates.filters["percent"] = percent
    page: str = templates.get_template("report.html.jinja").render(
        summary=run.summary,
        groups=GROUPS,
        rows={group: rows(run, group) for group in GROUPS},
        curves=curves([nan_to_none(record.as_dict()) for record in run.history]),
        history=run.history,
        audit=run.audit,
    )
    return page


def table(run: DemoRun) -> str:
    """The result as a table for the terminal."""
    cells = [("", "questions", "before", "after")]
    for group, title in GROUPS.items():
        before, after = (run.summary[f"{group}_accuracy_{when}"] for when in ("before", "after"))
        cells.append((title, str(run.summary["questions"][group]), f"{before:.0%}", f"{after:.0%}"))
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in run.summary["conflict_rate"].items())
    lines = [
        "",
        *aligned(cells),
        "",
        f"Updates in conflict: {rates}",
        "",
        *_audit_lines(run),
        f"{run.summary['seconds']:.0f} s, at most {run.summary['peak_memory_gib']:.1f} GiB of "
        "memory",
        "",
    ]
    if run.summary["failure"] is not None:
        lines.insert(-1, f"Failed: {run.summary['failure']}")
    return "\n".join(lines)


def _audit_lines(run: DemoRun) -> list[str]:
    if run.audit is None:
        return [f"No audit: {run.summary['audit']['reason']}"]
    return [
        "Brought back, of what the original knows:",
        *(str(finding) for finding in run.audit.findings),
        f"Verdict: {run.audit.verdict}",
    ]


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(nan_to_none(value), indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")
