"""report.html: one run, or several beside each other, as a page that needs no other file."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.evaluation.reading import by_theme, reading_of, verdict_of
from mollm.evaluation.summary import METRICS_FILE, Estimate
from mollm.methods.method import OBJECTIVES, role_of_objective
from mollm.report.audit_file import audit_of
from mollm.report.conflicts import conflict_rate
from mollm.report.run_file import RUN_FILE, read_run
from mollm.report.written import ANY, ESTIMATE, RUN, fault_in, fault_in_steps
from mollm.system.folders import public, replace_text, without_paths
from mollm.system.parsing import (
    is_file,
    lines_of,
    parse_json,
    parse_json_lines,
    read_text,
    user_path,
)
from mollm.system.terminal import printable

REPORT_FILE = "report.html"
HISTORY_FILE = "history.jsonl"
EVALUATION = "evaluation"
"""The folder of a run that `mollm evaluate` writes to."""
ORIGINAL = "original"
"""In that, the folder of the original's evaluation."""
COLOURS = ("forget", "kl", "retain", "c4", "c5", "c6", "c7", "c8")
"""Of curves and dots, as the style of the pages names them."""

Metrics = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class ReportedRun:
    """A run as it lies in its folder."""

    folder: Path
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: Metrics
    """Estimates by name, of each model that was evaluated: original, result, retain-only."""
    audit: dict[str, Any] | None = None
    """The verdict of its audit and the findings."""

    @property
    def name(self) -> str:
        """What it is called: the name of its folder."""
        return self.folder.resolve().name


def read_reported(folder: Path | str) -> ReportedRun:
    """Reads what a run and its evaluation left.

    Raises:
        UsageError: It is no folder of a run, or a file in it is damaged.
    """
    facts, history = read_steps(folder)
    root = Path(facts["folder"])
    return ReportedRun(root, facts, history, _metrics(root / EVALUATION), audit_of(facts))


def read_steps(folder: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of a run and its steps.

    Raises:
        UsageError: It is no folder of a run, or one of the two files is damaged.
    """
    facts = read_run(folder)
    root = Path(facts["folder"])
    history = []
    if os.path.exists(root / HISTORY_FILE):
        text = read_text(root / HISTORY_FILE, None)
        history = [step for _, step in parse_json_lines(text, str(root / HISTORY_FILE))]
    fault = fault_in(facts, RUN)
    if fault is not None:
        raise UsageError(
            f"{root / RUN_FILE} must be as `mollm unlearn` wrote it, but its "
            f"{fault or 'whole'} is not."
        )
    bad = fault_in_steps(history)
    if bad is not None:
        raise UsageError(
            f"{root / HISTORY_FILE} must be as `mollm unlearn` wrote it, but in line {bad[0] + 1} "
            f"its {bad[1]} is not."
        )
    return facts, history


def write_report(folders: Sequence[Path | str], path: Path) -> None:
    """Writes the page of a run, or of several beside each other.

    Raises:
        UsageError: A folder is not that of a run, or the file cannot be written.
    """
    page = render([read_reported(folder) for folder in folders])
    replace_text(path, page, follow_link=False)


def as_dict(run: ReportedRun) -> dict[str, Any]:
    """What the page of a run says, as plain values."""
    history = run.history
    names = curves(history)["losses"] if history else ()
    losses = {n: [history[i]["losses"][n] for i in (0, -1)] for n in names}
    private = ("replies", "folder")
    return {
        "run": run.name,
        **{name: value for name, value in run.facts.items() if name not in private},
        "losses": {n: {"first": a, "last": b} for n, (a, b) in losses.items()},
        "conflicts": {n: _means(history, n)["conflicts"] for n in losses},
        "metrics": {
            model: {name: asdict(estimate) for name, estimate in found.items()}
            for model, found in run.metrics.items()
        },
        "audit": run.audit,
        "replies": _examples(run),
    }


def write_public_report(folder: Path | str, path: Path) -> None:
    """Writes the page of a run for others: without replies, which repeat what was to be
    forgotten, and without the command.

    Raises:
        UsageError: The folder is not that of a run, or jinja2 is missing.
    """
    if find_spec("jinja2") is None:
        raise UsageError("a report needs the package jinja2: pip install jinja2.")
    run = read_reported(folder)
    private = ("replies", "command")
    facts = {name: value for name, value in run.facts.items() if name not in private}
    replace_text(path, render([replace(run, facts=facts)]))


def render(runs: Sequence[ReportedRun]) -> str:
    """The page as HTML; whatever is shown of data, settings or replies shows as the text it is.

    Raises:
        UsageError: There is no run.
    """
    if not runs:
        raise UsageError("a report must be of at least one run, but got none.")
    name, values = (
        ("run.html.jinja", _of_one(runs[0]))
        if len(runs) == 1
        else ("compare.html.jinja", _of_several(runs))
    )
    page: str = environment().get_template(name).render(**values)
    return page


@cache
def environment(*packages: str) -> Any:
    """The templates of this package, and of others that build on them."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from mollm.report.charts import Series, line_chart, log_chart, raster_chart
    from mollm.report.differences import differences

    made = Environment(
        loader=ChoiceLoader([PackageLoader(p, ".") for p in (*packages, "mollm.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def series_of(
        values: Mapping[str, Sequence[float | None]], colours: Sequence[str]
    ) -> list[Series]:
        named = zip(values.items(), colours, strict=True)
        return [Series(name, curve, colour) for (name, curve), colour in named]

    made.globals.update(
        Series=Series,
        series_of=series_of,
        differences=differences,
        line_chart=line_chart,
        log_chart=log_chart,
        colours_of=_colours_of,
        raster_chart=raster_chart,
        reading_of=reading_of,
    )
    made.filters.update(
        digits=digits,
        moment=moment,
        public=_in_words,
        role=role_of_objective,
        seconds=duration,
        without_paths=without_paths,
    )
    return made


def _shown(value: Any) -> Any:
    """A text of a stranger with a sign for what would turn the page around it; all else as it is.

    Markup is of this package's own making, with the texts in it escaped.
    """
    return printable("\n".join(lines_of(value))) if type(value) is str else value


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the figures of a page show, from the records of its steps."""
    pairs = list(history[0]["cosines"]) if history else []
    names = list(history[0]["losses"]) if history else OBJECTIVES
    return {
        "losses": {n: [step["losses"][n] for step in history] for n in names},
        "parts": {
            n: [_product(step["weights"][n], step["norms"][n]) for step in history] for n in names
        },
        "cosines": {pair: [step["cosines"].get(pair) for step in history] for pair in pairs},
        "conflicts": {
            n: [float(step["conflicts"].get(n, False)) for step in history] for n in names
        },
        "gap": [step["pareto_gap"] for step in history],
    }


def digits(value: Any) -> str:
    """A number in three digits; a sign where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "—"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def moment(text: str) -> str:
    """A date and time of ISO 8601 for people."""
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text


def _in_words(value: Any) -> Any:
    """A value for others to read, as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_in_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(_in_words(item)) for item in value)
    return public(value)


def _colours_of(names: Sequence[str]) -> list[str]:
    """That of its role for the first objective of each; the others of the palette in turn."""
    rest = itertools.cycle([name for name in COLOURS if name not in OBJECTIVES])
    roles = [role_of_objective(name) for name in names]
    return [
        role if role in OBJECTIVES and role not in roles[:place] else next(rest)
        for place, role in enumerate(roles)
    ]


def _product(weight: float | None, norm: float | None) -> float | None:
    return None if weight is None or norm is None else weight * norm


def _of_one(run: ReportedRun) -> dict[str, Any]:
    history = run.history
    shown = curves(history)
    return {
        "run": run,
        "facts": run.facts,
        "history": history,
        "curves": shown,
        "means": {n: _means(history, n) for n in shown["losses"]} if history else {},
        "tables": _tables(run.metrics),
        "examples": _examples(run),
        "columns": list(run.metrics),
        "audit": run.audit,
    }


def _means(history: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    weights = [s["weights"][name] for s in history if s["weights"][name] is not None]
    return {
        "weight": sum(weights) / len(weights) if weights else None,
        "conflicts": conflict_rate((step["conflicts"] for step in history), name),
    }


def _tables(metrics: Metrics) -> dict[str, list[dict[str, Any]]]:
    """For each theme its figures, with the estimate of every model."""
    names = dict.fromkeys(name for estimates in metrics.values() for name in estimates)
    return {
        theme: [_row(name, metrics) for name in some] for theme, some in by_theme(names).items()
    }


def _row(name: str, metrics: Metrics) -> dict[str, Any]:
    estimates = {model: found.get(name) for model, found in metrics.items()}
    verdict = verdict_of(name, estimates.get("original"), estimates.get("result"))
    return {"name": name, "good": reading_of(name).good, "of": estimates, "verdict": verdict}


def _examples(run: ReportedRun) -> list[dict[str, Any]]:
    """Replies before and after: those that the run asked for."""
    return list(run.facts.get("replies") or [])


def _metrics(folder: Path) -> Metrics:
    found = {
        "original": _estimates(folder / ORIGINAL),
        "result": _estimates(folder),
        "retain-only": _estimates(_retain_only(folder)),
    }
    return {name: estimates for name, estimates in found.items() if estimates}


def _estimates(folder: Path | None) -> dict[str, Estimate]:
    if folder is None or not is_file(folder / METRICS_FILE):
        return {}
    path = folder / METRICS_FILE
    try:
        read = parse_json(read_text(path), str(path))
        fault = fault_in(read["metrics"], {ANY: ESTIMATE})
        if fault is not None:
            raise TypeError(fault)
        return {name: Estimate(**entry) for name, entry in read["metrics"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} must be as `mollm evaluate` wrote it, but it is not: remove {folder}, and "
            "evaluate again."
        ) from error


def _retain_only(folder: Path) -> Path | None:
    """Where the evaluation is that this one compared with."""
    try:
        about = parse_json(read_text(folder / "about.json"), "about.json")
        logs = user_path(about["settings"]["retain_logs"])
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return logs if logs.is_dir() else logs.parent


def _of_several(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    from mollm.report.charts import Series

    if len(runs) > len(COLOURS):
        raise UsageError(
            f"a report must be of at most {len(COLOURS)} runs, but got {len(runs)}: compare fewer."
        )
    names = _names(runs)
    settings = [run.facts.get("settings", {}) | {"model": run.facts["label"]} for run in runs]
    for told, run in zip(settings, runs, strict=True):
        told |= {f"{n} data": d["sha256"][:12] for n, d in run.facts["data"].items()}
    known = dict.fromkeys(name for each in settings for name in each)
    unlike = [n for n in known if len({str(each.get(n)) for each in settings}) > 1]
    figures = dict.fromkeys(name for run in runs for name in run.metrics.get("result", {}))
    return {
        "runs": runs,
        "names": names,
        "colours": COLOURS,
        "objectives": dict.fromkeys(n for run in runs for n in curves(run.history)["losses"]),
        "series": lambda name: [
            Series(names[i], [step["losses"].get(name) for step in run.history], COLOURS[i])
            for i, run in enumerate(runs)
        ],
        "unlike": {name: [each.get(name) for each in settings] for name in unlike},
        "alike": {name: settings[0].get(name) for name in known if name not in unlike},
        "audits": [run.audit for run in runs],
        "tables": {
            theme: [(name, [run.metrics.get("result", {}).get(name) for run in runs])
                    for name in some]
            for theme, some in by_theme(figures).items()
        },
    }  # fmt: skip


def _names(runs: Sequence[ReportedRun]) -> list[str]:
    """Names that tell the runs apart: as much of the end of their paths as that takes."""
    paths = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]
