"""The paper's checks and open questions, each a figure and a sentence made from its figures.

Most of them only read the runs of the table. Those that need runs of their own keep them in a file
beside it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from mollm.methods import unlearning_cross_entropy
from mollm.optim.directions import make_rule
from quality import plan
from quality.case import Case
from quality.runs import (
    Row,
    RunFile,
    Schedule,
    method_of,
    schedule_of,
    settings_of,
    unlearned,
)
from quality.summary import DEFAULT, of_methods, save, score, table


class NotRunError(LookupError):
    """The runs that a check is about have not been made."""


@dataclass(frozen=True)
class Check:
    """One check on one task: numbers, what they say, and how they are drawn."""

    name: str
    title: str
    task: str
    sentence: str
    data: dict[str, Any]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Setting:
    """What a check reads, and where it runs."""

    task: str
    rows: Sequence[Row]
    """The runs of the tables."""
    own: RunFile
    """The runs of the checks."""
    quick: bool
    seeds: Sequence[int] = ()
    cases: Callable[[int], Case] | None = None
    """Makes the case of a seed; None where nothing is to be run."""
    about: Row = field(default_factory=dict)
    """Where a run comes from."""

    @functools.cached_property
    def chosen(self) -> dict[str, list[Row]]:
        """Each method's runs on its best schedule, best method first.

        Raises:
            NotRunError: There are none.
        """
        chosen = of_methods(self.rows, self.task)
        if not chosen:
            raise NotRunError(self.task)
        return {line["method"]: chosen[line["method"]] for line in table(self.rows, self.task)}

    def ends(self, what: str) -> dict[str, list[Row]]:
        """By method the endings, see `quality.endings`, of the runs whose ending has `what`.

        Raises:
            NotRunError: There are none.
        """
        found = {
            name: [run["end"] for run in runs if run.get("end", {}).get(what)]
            for name, runs in self.chosen.items()
        }
        found = {name: ends for name, ends in found.items() if ends}
        if not found:
            raise NotRunError(what)
        return found

    def schedule(self, method: str) -> Schedule:
        """The best one of the sweep; the middle one where there are no runs."""
        runs = of_methods(self.rows, self.task).get(method)
        sweep = plan.budget(self.task, self.quick).sweep
        return schedule_of(runs[0]) if runs else sweep[len(sweep) // 2]

    def run(self, label: str, name: str, schedule: Schedule, **changes: Any) -> list[Row]:
        """The runs of a method with some of its fields changed, on one schedule.

        Raises:
            NotRunError: There are none, and nothing is to be run.
        """
        steps = plan.budget(self.task, self.quick).steps
        for seed in self.seeds if self.cases is not None else ():
            method = replace(method_of(name), **changes)
            how = {**asdict(schedule), "steps": steps, "seed": seed}
            key = {"task": self.task, "method": label, "settings": settings_of(method), **how}
            if self.cases is not None and not self.own.has(key):
                _, row = unlearned(self.cases(seed), method, **how)
                self.own.add({**key, **self.about, **row})
        runs = self.own.of(self.task, label)
        if not runs:
            raise NotRunError(label)
        return runs


def _lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    path: Path,
    *,
    log: str = "",
) -> None:
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, "o-", ms=3, lw=1.5, label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    save(figure, axes, path)


def _bar_chart(series: dict[str, dict[str, float]], label: str, path: Path) -> None:
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    axes = figure.subplots()
    _bars(axes, series, label)
    save(figure, axes, path)


def _bars(axes: Axes, series: dict[str, dict[str, float]], label: str) -> None:
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    width = 0.8 / len(series)
    for place, (what, values) in enumerate(series.items()):
        xs = [i + place * width for i in range(len(names))]
        axes.bar(xs, [values.get(name, math.nan) for name in names], width, label=what)
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(names))], names, rotation=60, ha="right", fontsize=8
    )
    axes.set_ylabel(label)


def _squares(series: dict[str, dict[str, float]], path: Path) -> None:
    """A square for each method and group, its shade and number a share."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure = Figure(
        figsize=(2.2 + 0.52 * len(series), 1.6 + 0.24 * len(names)), layout="constrained"
    )
    axes = figure.subplots()
    shares = [[values.get(name, math.nan) for values in series.values()] for name in names]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(shares):
        for column, value in enumerate(line):
            shade = "white" if value > 0.6 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade
            )
    axes.set_xticks(range(len(series)), list(series), rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def norms(setting: Setting) -> Check:
    """GA against UCE, each alone: the norm of the forget gradient along the run."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    alone: dict[str, Any] = {"direction": "sum", "preferences": (1.0, 0.0, 0.0)}
    schedule = plan.budget(setting.task, setting.quick).sweep[0]
    for label, name in (("gradient ascent", "ga"), ("unlearning cross-entropy", "sum")):
        rows = setting.run(f"{label} alone", name, schedule, **alone)
        steps = sorted({0, *(point["step"] - 1 for point in rows[0]["curve"][1:])})
        columns = zip(*(row["norms"] for row in rows), strict=True)
        series[label] = (steps, [statistics.mean(n[0] for n in column) for column in columns])
    (_, ga), (_, uce) = series.values()
    sentence = (
        f"Along {rows[0]['steps']} steps at lr {rows[0]['lr']:g} the forget gradient of ascent "
        f"goes from {ga[0]:.2g} to {ga[-1]:.2g} (largest {max(ga):.2g}), that of UCE from "
        f"{uce[0]:.2g} to {uce[-1]:.2g} (largest {max(uce):.2g}); seen at {len(ga)} places of "
        "the run."
    )
    draw = functools.partial(_lines, series, ("step", "norm of the forget gradient"), log="y")
    data = {label: list(values) for label, (_, values) in series.items()}
    title = "Gradient norms: ascent against UCE"
    return Check("norms", title, setting.task, sentence, data, draw)


def conflicts(setting: Setting) -> Check:
    """Conflicts of direction and applied update, from the runs of the table."""
    series = {
        what: {
            name: statistics.mean(rate for run in runs for rate in run[f"{what} conflicts"])
            for name, runs in setting.chosen.items()
        }
        for what in ("direction", "update")
    }
    update = series["update"]
    free = [name for name, rate in series["direction"].items() if rate == 0]
    least = min(update, key=lambda name: update[name])
    named = {"the weighted sum": "sum", "the package's default": DEFAULT}
    rates = "; ".join(
        f"of {what}, {name}, {series['direction'][name]:.1%} (direction) and {update[name]:.1%} "
        "(update)"
        for what, name in named.items()
        if name in update
    )
    sentence = (
        f"Steps in conflict with an objective: {rates or 'see the figure'}. No direction of "
        f"{', '.join(free) or 'any method'} ever conflicts; the fewest conflicts of the update, "
        f"{update[least]:.1%}, are those of {least}."
    )
    draw = functools.partial(_bar_chart, series, "share of steps in conflict")
    title = "Conflicts of direction and update"
    return Check("conflicts", title, setting.task, sentence, series, draw)


def gap(setting: Setting) -> Check:
    """The Pareto gap along the run, from the runs of the table."""
    shown = ("mollm", "sum", "dual", "project", "upgrad", "ga")
    series: dict[str, tuple[Sequence[float], list[float]]] = {}
    for name in (name for name in shown if name in setting.chosen):
        runs = setting.chosen[name]
        steps = sorted({0, *(point["step"] - 1 for point in runs[0]["curve"][1:])})
        columns = zip(*(run["gaps"] for run in runs), strict=True)
        series[name] = (steps, [statistics.mean(column) for column in columns])
    if not series:
        raise NotRunError("gap")
    ends = ", ".join(f"{name} {gaps[0]:.2f} → {gaps[-1]:.2f}" for name, (_, gaps) in series.items())
    sentence = f"Pareto gap of the mini-batch at the first and the last step: {ends}."
    draw = functools.partial(_lines, series, ("step", "Pareto gap"))
    data = {name: gaps for name, (_, gaps) in series.items()}
    return Check("gap", "Pareto gap along the run", setting.task, sentence, data, draw)


def epsilon(setting: Setting) -> Check:
    """The area for ε from 1e-6 to 0.5."""
    values = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5)
    series: dict[str, tuple[Sequence[float], list[float]]] = {}
    for name in ("mollm", "sum", "project-unit"):
        areas = []
        for eps in values:
            loss = functools.partial(unlearning_cross_entropy, eps=eps)
            schedule = setting.schedule(name)
            runs = setting.run(f"{name} ε={eps:g}", name, schedule, forget_loss=loss)
            areas.append(statistics.mean(map(score, runs)))
        series[name] = (values, areas)
    best = {name: values[areas.index(max(areas))] for name, (_, areas) in series.items()}
    spread = ", ".join(
        f"{name} {min(a):.3f} to {max(a):.3f} (best at {best[name]:g})"
        for name, (_, a) in series.items()
    )
    sentence = f"Hypervolume over ε from 1e-6 to 0.5, on the best schedule of ε = 1e-4: {spread}."
    draw = functools.partial(_lines, series, ("ε", "hypervolume"), log="x")
    data = {name: dict(zip(map(str, values), a, strict=True)) for name, (_, a) in series.items()}
    return Check("epsilon", "Sensitivity to ε", setting.task, sentence, data, draw)


def objectives(setting: Setting) -> Check:
    """Quality for K up to 8 from the synthetic facts' tables, and the solver's time beyond."""
    if plan.kind_of(setting.task) != "facts":
        raise NotRunError("objectives")
    shown = ("mollm", "sum", "pcgrad", "dual", "project-unit")
    quality: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in shown}
    for count in plan.OBJECTIVE_COUNTS:
        for line in table(setting.rows, f"facts-{count}"):
            if line["method"] in quality:
                quality[line["method"]][0].append(count)
                quality[line["method"]][1].append(line["hypervolume"])
    quality = {name: values for name, values in quality.items() if values[0]}
    cost = {count: _solver_seconds(count) for count in (2, 4, 8, 16, 32)}
    milliseconds = ", ".join(f"{1000 * s:.2g} ms at K = {count}" for count, s in cost.items())
    areas = "; ".join(
        f"{name} " + ", ".join(f"{a:.3f}" for a in ys) for name, (_, ys) in quality.items()
    )
    counts = ", ".join(str(int(c)) for c in next(iter(quality.values()), ([], []))[0])
    sentence = f"Solving upgrad takes {milliseconds}"
    sentence += f"; hypervolume at K = {counts}: {areas}." if quality else "."
    times = {"solver": (list(cost), list(cost.values()))}
    data = {"solver seconds": {str(c): s for c, s in cost.items()}} | {
        name: list(ys) for name, (_, ys) in quality.items()
    }

    def draw(path: Path) -> None:
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(*times["solver"], "o-", ms=3)
        left.set(xscale="log", yscale="log", xlabel="K", ylabel="seconds to solve (upgrad)")
        for name, (xs, ys) in quality.items():
            right.plot(xs, ys, "o-", ms=3, label=name)
        right.set(xlabel="K", ylabel="hypervolume")
        save(figure, right, path)

    title = "More than three objectives"
    return Check("objectives", title, setting.task, sentence, data, draw)


def _solver_seconds(count: int) -> float:
    torch.manual_seed(0)
    g = torch.randn(count, 200, dtype=torch.float64) + 0.3
    gram = g @ g.T
    rule = make_rule("upgrad", objectives=count, preferences=None, normalize=True, length="mean")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        rule(gram)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


_KNOWN = 0.05
"""What the original does not give this likelihood it does not know, and cannot forget."""


def distribution(setting: Setting) -> Check:
    """What is left outside of the objectives' data, at the end of the table's runs."""
    series: dict[str, dict[str, float]] = {}
    for group in ("forget", "retain", "heldout", "outside"):
        series[group] = {
            name: statistics.mean(run["curve"][-1][group] for run in runs)
            for name, runs in setting.chosen.items()
        }
    runs = [run for mine in setting.chosen.values() for run in mine if "end" in run]
    asked: Mapping[str, float] = runs[0]["end"]["rewordings"] if runs else {}
    unknown = [
        group for group in asked if statistics.mean(run["original"][group] for run in runs) < _KNOWN
    ]
    for group in [group for group in asked if group not in unknown]:
        series[group] = {
            name: statistics.mean(end["rewordings"][group] for end in ends)
            for name, ends in setting.ends("rewordings").items()
        }
    best = next(iter(setting.chosen))
    kept = "; ".join(
        f"{group} {values[best]:.3f}" for group, values in series.items() if best in values
    )
    sentence = f"What {best}, first in the table, leaves of the original's likelihood: {kept}."
    if asked:
        sentence += " What was to be forgotten should be gone in other words too, the rest not."
    if unknown:
        sentence += (
            " Not judged, as the original itself gives the answer a likelihood below "
            f"{_KNOWN:g}: {'; '.join(unknown)}."
        )
    draw = functools.partial(_squares, series)
    return Check("distribution", "Other distributions", setting.task, sentence, series, draw)


_FORGOTTEN = 0.8
"""A run that has forgotten less than this share has little to learn again."""
_GOES_WITH = 0.5
"""A rank correlation above it says that two figures go together."""


def relearning(setting: Setting) -> Check:
    """Likelihood of the forget set after training on ten answers of it once more, by method; and,
    over all runs that forgot, against what they kept."""
    ends = setting.ends("relearned")
    series = {
        "unlearned": {
            name: statistics.mean(run["curve"][-1]["forget"] for run in setting.chosen[name])
            for name in ends
        }
    }
    labels = {"forget": "all, relearned", "ten": "the ten", "others": "the others"}
    for part, label in labels.items():
        series[label] = {
            name: statistics.mean(end["relearned"][part] for end in mine)
            for name, mine in ends.items()
            if part in mine[0]["relearned"]
        }
    last = labels["others"] if series["the others"] else labels["forget"]
    series = {label: values for label, values in series.items() if values}
    grown = ", ".join(f"{n} {series['unlearned'][n]:.2f} → {series[last][n]:.2f}" for n in ends)
    taught, left = (
        ("ten of its examples", "its other examples")
        if last == "the others"
        else ("all of its few examples", "them")
    )
    part = next(part for part, label in labels.items() if label == last)
    kept = [
        (run["curve"][-1]["heldout"], run["end"]["relearned"][part])
        for run in setting.rows
        if run["task"] == setting.task
        and 1 - run["curve"][-1]["forget"] >= _FORGOTTEN
        and "relearned" in run.get("end", {})
    ]
    sentence = (
        f"Left of the forget set before ten steps on {taught}, and of {left} afterwards: {grown}."
    )
    if len(kept) > 2:
        rank = spearmanr(*zip(*kept, strict=True)).statistic
        sentence += (
            f" Over the {len(kept)} runs of all methods, schedules and seeds that forgot at least "
            f"{_FORGOTTEN:.0%}, the rank correlation of what comes back with what was kept of the "
            f"held-out facts is {rank:.2f}"
        )
        sooner = ": runs that kept more are sooner taught again."
        sentence += sooner if rank > _GOES_WITH else "."

    def draw(path: Path) -> None:
        figure = Figure(figsize=(11.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        _bars(left, series, "left of the original's likelihood")
        right.plot([x for x, _ in kept], [y for _, y in kept], "o", ms=3, alpha=0.5)
        right.set(xlabel="kept, held out, before", ylabel=f"{last}, after")
        save(figure, left, path)

    title = "Relearning with ten examples"
    data = {**series, "kept and relearned": kept}
    return Check("relearning", title, setting.task, sentence, data, draw)


def rounding(setting: Setting) -> Check:
    """Likelihoods after rounding the weights to 4 bits."""
    ends = setting.ends("rounded")
    series: dict[str, dict[str, float]] = {}
    for group in ("forget", "heldout"):
        series[group] = {
            name: statistics.mean(run["curve"][-1][group] for run in setting.chosen[name])
            for name in ends
        }
        series[f"{group}, 4 bits"] = {
            name: statistics.mean(end["rounded"][group] for end in mine)
            for name, mine in ends.items()
        }
    back, kept = (
        ", ".join(f"{n} {series[g][n]:.2f} → {series[f'{g}, 4 bits'][n]:.2f}" for n in ends)
        for g in ("forget", "heldout")
    )
    sentence = (
        f"Left of the forget set before and after rounding the weights to 4 bits: {back}. Left of "
        f"the held-out facts: {kept}."
    )
    draw = functools.partial(_bar_chart, series, "left of the original's likelihood")
    title = "Rounding to 4 bits after unlearning"
    return Check("rounding", title, setting.task, sentence, series, draw)


CHECKS: dict[str, Callable[[Setting], Check]] = {
    check.__name__: check
    for check in (norms, conflicts, gap, epsilon, objectives, distribution, relearning, rounding)
}


OWN = ("norms", "epsilon")
"""Those that need runs of their own."""


def run(
    tasks: Iterable[str],
    names: Iterable[str],
    seeds: Sequence[int],
    means: plan.Means,
    rows: Sequence[Row],
    own: RunFile,
    about: Row,
) -> None:
    """Makes the runs that the named checks need on these tasks and that are not in `own` yet."""
    for task in tasks:
        for seed in seeds:
            case = functools.cache(functools.partial(plan.make_case, task, means=means))
            setting = Setting(task, rows, own, means.quick, (seed,), case, about)
            for name in names:
                CHECKS[name](setting)


def read(rows: Sequence[Row], own: RunFile, quick: bool) -> list[Check]:
    """Every check whose runs are there: on one task of each kind, and where it was asked for."""
    tasks = plan.all_tasks(rows)
    shown = {plan.kind_of(task): task for task in tasks}
    if "facts-4" in tasks:
        shown["facts"] = "facts-4"
    asked = {row["task"] for row in own.rows}
    found = []
    for name, check in CHECKS.items():
        for task in tasks:
            if task in shown.values() or (name in OWN and task in asked):
                with contextlib.suppress(NotRunError):
                    found.append(check(Setting(task, rows, own, quick)))
    return found
