"""The paper's checks and open questions, each a figure and a sentence made from its figures."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from mollm.methods import unlearning_cross_entropy
from mollm.rules import make_rule
from mollm_ops import linear_cross_entropy
from quality import plan
from quality.case import Case, likelihood
from quality.runs import Row, RunFile, method_of, unlearned
from quality.summary import of_methods, save, score, table


@dataclass(frozen=True)
class Check:
    """One check: numbers, what they say, and how they are drawn."""

    name: str
    title: str
    sentence: str
    data: dict[str, Any]
    draw: Callable[[Path], None]


def _lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
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


def _bars(series: dict[str, dict[str, float]], label: str, path: Path) -> None:
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    width = 0.8 / len(series)
    for place, (what, values) in enumerate(series.items()):
        xs = [i + place * width for i in range(len(names))]
        axes.bar(xs, [values.get(name, math.nan) for name in names], width, label=what)
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(names))], names, rotation=60, ha="right", fontsize=8
    )
    axes.set_ylabel(label)
    save(figure, axes, path)


def _best_lr(file: RunFile, task: str, method: str, quick: bool) -> float:
    """The learning rate of the study's own sweep; the middle one where there are no runs."""
    chosen = of_methods(file.rows, task).get(method)
    lrs = plan.budget(task, quick).lrs
    return float(chosen[0]["lr"]) if chosen else lrs[len(lrs) // 2]


@dataclass(frozen=True)
class Setting:
    """Where a check runs."""

    task: str
    seeds: Sequence[int]
    cases: Callable[[int], Case]
    file: RunFile
    quick: bool

    @property
    def steps(self) -> int:
        return plan.budget(self.task, self.quick).steps

    def lr(self, method: str) -> float:
        """The best learning rate of the sweep."""
        return _best_lr(self.file, self.task, method, self.quick)

    def run(self, name: str, seed: int, **changes: Any) -> tuple[nn.Module, Row]:
        """One run of a method with some of its fields changed."""
        method = replace(method_of(name), **changes)
        lr = self.lr(name)
        return unlearned(self.cases(seed), method, lr=lr, steps=self.steps, seed=seed)


def norms(setting: Setting) -> Check:
    """GA against UCE, each alone: the norm of the forget gradient along the run."""
    series = {}
    alone = {"direction": "sum", "preferences": (1.0, 0.0, 0.0)}
    lr = plan.budget(setting.task, setting.quick).lrs[0]
    for label, name in (("gradient ascent", "ga"), ("unlearning cross-entropy", "sum")):
        rows = [
            unlearned(
                setting.cases(seed),
                replace(method_of(name), **alone),
                lr=lr,
                steps=setting.steps,
                seed=seed,
            )[1]
            for seed in setting.seeds
        ]
        steps = [point["step"] for point in rows[0]["curve"]]
        steps = [0, *(s - 1 for s in steps[1:])][: len(rows[0]["norms"])]
        columns = zip(*(row["norms"] for row in rows), strict=True)
        series[label] = (steps, [statistics.mean(n[0] for n in column) for column in columns])
    (_, ga), (_, uce) = series.values()
    sentence = (
        f"Along {setting.steps} steps at lr {lr:g} the forget gradient of ascent goes from "
        f"{ga[0]:.2g} to {ga[-1]:.2g} (largest {max(ga):.2g}), that of UCE from {uce[0]:.2g} to "
        f"{uce[-1]:.2g} (largest {max(uce):.2g}); seen at {len(ga)} places of the run."
    )
    draw = functools.partial(_lines, series, ("step", "norm of the forget gradient"), log="y")
    data = {label: list(values) for label, (_, values) in series.items()}
    return Check("norms", "Gradient norms: ascent against UCE", sentence, data, draw)


def conflicts(setting: Setting) -> Check:
    """Conflicts of direction and applied update, from the runs of the table."""
    lines = table(setting.file.rows, setting.task)
    series = {
        what: {line["method"]: line[f"{what} conflicts"] for line in lines}
        for what in ("direction", "update")
    }
    update = series["update"]
    free = [name for name, rate in series["direction"].items() if rate == 0]
    least = min(update, key=lambda name: update[name])
    sentence = (
        f"Of the weighted sum's steps {series['direction'].get('sum', math.nan):.1%} (direction) "
        f"and {update.get('sum', math.nan):.1%} (update) conflict with an objective; no direction "
        f"of {', '.join(free) or 'any method'} ever does; the fewest conflicts of the update, "
        f"{update[least]:.1%}, are those of {least}."
    )
    draw = functools.partial(_bars, series, "share of steps in conflict")
    return Check("conflicts", "Conflicts of direction and update", sentence, series, draw)


def gap(setting: Setting) -> Check:
    """The Pareto gap along the run, from the runs of the table."""
    series = {}
    for name, runs in of_methods(setting.file.rows, setting.task).items():
        if name in ("sum", "dual", "project", "upgrad", "upgrad-unit", "ga"):
            steps = [0, *(point["step"] - 1 for point in runs[0]["curve"][1:])]
            columns = zip(*(run["gaps"] for run in runs), strict=True)
            gaps = [statistics.mean(column) for column in columns]
            series[name] = (sorted(set(steps)), gaps)
    ends = ", ".join(f"{name} {gaps[0]:.2f} → {gaps[-1]:.2f}" for name, (_, gaps) in series.items())
    sentence = f"Pareto gap of the mini-batch at the first and the last step: {ends}."
    draw = functools.partial(_lines, series, ("step", "Pareto gap"))
    data = {name: gaps for name, (_, gaps) in series.items()}
    return Check("gap", "Pareto gap along the run", sentence, data, draw)


def epsilon(setting: Setting) -> Check:
    """The area for ε from 1e-6 to 0.5."""
    values = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5)
    series: dict[str, tuple[Sequence[float], list[float]]] = {}
    for name in ("sum", "project-unit", "upgrad-unit"):
        areas = []
        for eps in values:
            loss = functools.partial(unlearning_cross_entropy, eps=eps)
            runs = [setting.run(name, seed, forget_loss=loss)[1] for seed in setting.seeds]
            areas.append(statistics.mean(score(run) for run in runs))
        series[name] = (values, areas)
    best = {name: values[areas.index(max(areas))] for name, (_, areas) in series.items()}
    spread = ", ".join(
        f"{name} {min(a):.3f} to {max(a):.3f} (best at {best[name]:g})"
        for name, (_, a) in series.items()
    )
    sentence = f"Hypervolume over ε from 1e-6 to 0.5, at the learning rate of ε = 1e-3: {spread}."
    draw = functools.partial(_lines, series, ("ε", "hypervolume"), log="x")
    data = {name: dict(zip(map(str, values), a, strict=True)) for name, (_, a) in series.items()}
    return Check("epsilon", "Sensitivity to ε", sentence, data, draw)


def objectives(setting: Setting) -> Check:
    """Quality for K up to 8 from the tables, and the solver's time beyond."""
    shown = ("sum", "dual", "project-unit", "upgrad-unit", "upgrad-unit+adam")
    quality: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in shown}
    for count in plan.OBJECTIVE_COUNTS:
        for line in table(setting.file.rows, f"facts-{count}"):
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

    return Check("objectives", "More than three objectives", sentence, data, draw)


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


def distribution(setting: Setting) -> Check:
    """What is left outside of the objectives' data, at the end of the table's runs."""
    chosen = of_methods(setting.file.rows, setting.task)
    names = [line["method"] for line in table(setting.file.rows, setting.task)]
    groups = [g for g in ("retain", "heldout", "outside", "rephrased") if g in _ends(chosen)]
    series = {
        group: {n: statistics.mean(r["curve"][-1][group] for r in chosen[n]) for n in names}
        for group in groups
    }
    best = names[0]
    kept = ", ".join(f"{group} {series[group][best]:.3f}" for group in groups)
    sentence = f"What {best}, first in the table, leaves of the original's likelihood: {kept}"
    if "rephrased" in series:
        left = statistics.mean(run["curve"][-1]["forget"] for run in chosen[best])
        sentence += (
            f", where the forget set itself is left {left:.3f}: rephrased asks for the same "
        )
        sentence += "facts in other words, and should be gone too"
    sentence += ". Other languages were not asked."
    draw = functools.partial(_bars, series, "left of the original's likelihood")
    return Check("distribution", "Other distributions", sentence, series, draw)


def _ends(chosen: dict[str, list[Row]]) -> set[str]:
    return set(next(iter(chosen.values()))[0]["curve"][-1])


COMPARED = ("ga", "npo", "simnpo", "sum", "dual", "project-unit", "upgrad-unit")


def relearning(setting: Setting) -> Check:
    """Likelihood of the forget set after training on ten answers of it once more."""
    series: dict[str, dict[str, float]] = {"unlearned": {}, "after ten examples": {}}
    for name in COMPARED:
        before, after = [], []
        for seed in setting.seeds:
            case = setting.cases(seed)
            model, run = setting.run(name, seed)
            before.append(run["curve"][-1]["forget"])
            _train_on_ten(case, model, setting.lr("sum"))
            after.append(likelihood(case, model, "forget") / run["original"]["forget"])
        series["unlearned"][name] = statistics.mean(before)
        series["after ten examples"][name] = statistics.mean(after)
    grown = ", ".join(
        f"{n} {series['unlearned'][n]:.2f} → {series['after ten examples'][n]:.2f}"
        for n in COMPARED
    )
    sentence = f"Left of the forget set before and after ten steps on ten of its examples: {grown}."
    draw = functools.partial(_bars, series, "left of the forget set")
    return Check("relearning", "Relearning with ten examples", sentence, series, draw)


def _train_on_ten(case: Case, model: nn.Module, lr: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        answers = case.answers(model, case.groups["forget"][0])
        rows = answers.sequence < 10
        loss = linear_cross_entropy(
            answers.hidden[rows], answers.weight, answers.target[rows], bias=answers.bias
        )
        torch.autograd.backward(loss)
        optimizer.step()


def rounding(setting: Setting) -> Check:
    """Likelihoods after rounding the weights to 4 bits."""
    series: dict[str, dict[str, float]] = {
        "forget": {},
        "forget, 4 bits": {},
        "held out": {},
        "held out, 4 bits": {},
    }
    for name in COMPARED:
        columns: dict[str, list[float]] = {what: [] for what in series}
        for seed in setting.seeds:
            case = setting.cases(seed)
            model, run = setting.run(name, seed)
            rounded = deepcopy(model)
            round_to_4_bits(rounded)
            columns["forget"].append(run["curve"][-1]["forget"])
            columns["held out"].append(run["curve"][-1]["heldout"])
            for group, what in (("forget", "forget"), ("heldout", "held out")):
                left = likelihood(case, rounded, group) / run["original"][group]
                columns[f"{what}, 4 bits"].append(left)
        for what, values in columns.items():
            series[what][name] = statistics.mean(values)
    back = ", ".join(
        f"{n} {series['forget'][n]:.2f} → {series['forget, 4 bits'][n]:.2f}" for n in COMPARED
    )
    sentence = f"Left of the forget set before and after rounding the weights to 4 bits: {back}."
    draw = functools.partial(_bars, series, "left of the original's likelihood")
    return Check("rounding", "Rounding to 4 bits after unlearning", sentence, series, draw)


@torch.no_grad()
def round_to_4_bits(model: nn.Module, group: int = 32) -> None:
    """Rounds every matrix that was trained to 16 levels, with one scale for `group` weights."""
    for p in model.parameters():
        if p.requires_grad and p.ndim == 2:
            blocks = p.reshape(-1, group)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            p.copy_(((blocks / scale).round().clamp(-8, 7) * scale).reshape(p.shape))


CHECKS: dict[str, Callable[[Setting], Check]] = {
    check.__name__: check
    for check in (norms, conflicts, gap, epsilon, objectives, distribution, relearning, rounding)
}


def run_checks(options: argparse.Namespace, file: RunFile) -> list[Check]:
    """The checks that were asked for, on the last task of the command line."""
    if options.checks is None:
        return []
    task = plan.tasks_of(options.tasks, options.quick)[-1]
    cases = functools.lru_cache(
        lambda seed: plan.make_case(
            task, seed, options.data, options.quick, options.folder / "models"
        )
    )
    setting = Setting(task, options.seeds, cases, file, options.quick)
    return [CHECKS[name](setting) for name in options.checks or CHECKS]
