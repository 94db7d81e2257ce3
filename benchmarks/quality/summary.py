"""From runs to figures: hypervolumes with intervals, the table, the Pareto plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t as student

from mollm.methods.common_descent import COMMON_DESCENT, MOLLM
from quality.plan import CANDIDATES, CHOICE_TASKS
from quality.runs import Row, Schedule, schedule_of

DEFAULT = MOLLM.name
Point = tuple[float, float]


def hypervolume(points: Sequence[Point]) -> float:
    """Area of the union of the rectangles from (0, 0) to each point: 1 where (1, 1) is reached.

    A point is (forgotten, kept), both shares in [0, 1].
    """
    area, best = 0.0, 0.0
    for forgotten, kept in sorted(points, reverse=True):
        if kept > best:
            area += forgotten * (kept - best)
            best = kept
    return area


def points_of(run: Row, kept: str = "heldout") -> list[Point]:
    """Forgotten, 1 − what is left of the forget set, and what is kept, along a run."""
    return [(1 - point["forget"], point[kept]) for point in run["curve"]]


def score(run: Row) -> float:
    """The hypervolume of the whole run."""
    return hypervolume(points_of(run))


def of_methods(rows: Sequence[Row], task: str) -> dict[str, list[Row]]:
    """For each method the runs on its best schedule, that of the highest mean score.

    Only seeds that every schedule of the method has been run with are looked at.
    """
    chosen = {}
    mine = [row for row in rows if row["task"] == task]
    for name in dict.fromkeys(row["method"] for row in mine):
        tried: dict[Schedule, dict[int, Row]] = {}
        for row in mine:
            if row["method"] == name:
                tried.setdefault(schedule_of(row), {})[row["seed"]] = row
        seeds = set.intersection(*(set(runs) for runs in tried.values()))
        if seeds:
            runs_of = [[runs[seed] for seed in sorted(seeds)] for runs in tried.values()]
            chosen[name] = max(runs_of, key=lambda runs: statistics.mean(map(score, runs)))
    return chosen


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95% interval of the mean over seeds; None for a single seed.

    A bootstrap of so few values would hardly ever leave their range, and be too narrow.
    """
    if len(values) < 2:
        return None
    middle, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(student.ppf(0.975, len(values) - 1)) * error
    return [middle - reach, middle + reach]


def table(rows: Sequence[Row], task: str) -> list[Row]:
    """A line for each method, best first. Shares are means over seeds, seconds the median."""
    lines = []
    tried: dict[str, set[Schedule]] = {}
    for row in rows:
        if row["task"] == task:
            tried.setdefault(row["method"], set()).add(schedule_of(row))
    for name, runs in of_methods(rows, task).items():
        areas = [score(run) for run in runs]

        def average(value: Callable[[Row], float], runs: list[Row] = runs) -> float:
            return round(statistics.mean(map(value, runs)), 4)

        lines.append(
            {
                "method": name,
                "hypervolume": round(statistics.mean(areas), 4),
                "interval": interval(areas),
                "forgotten": average(lambda run: 1 - run["curve"][-1]["forget"]),
                "retain": average(lambda run: run["curve"][-1]["retain"]),
                "heldout": average(lambda run: run["curve"][-1]["heldout"]),
                "outside": average(lambda run: run["curve"][-1]["outside"]),
                "direction conflicts": average(lambda r: statistics.mean(r["direction conflicts"])),
                "update conflicts": average(lambda r: statistics.mean(r["update conflicts"])),
                "gap": [average(lambda r: r["gaps"][0]), average(lambda r: r["gaps"][-1])],
                "lr": runs[0]["lr"],
                "warmup": schedule_of(runs[0]).warmup,
                "edge": is_at_the_edge(schedule_of(runs[0]), tried[name]),
                "seconds": statistics.median(run["seconds"] for run in runs),
                "seeds": len(runs),
                "figures": figures_of(runs),
            }
        )
    return sorted(lines, key=lambda line: -line["hypervolume"])


def is_at_the_edge(schedule: Schedule, sweep: Collection[Schedule]) -> bool:
    """Whether no lower or no higher rate was tried with this warm-up, but another one was."""
    rates = [other.lr for other in sweep if other.warmup == schedule.warmup]
    return len(rates) > 1 and schedule.lr in (min(rates), max(rates))


def figures_of(runs: Sequence[Row]) -> dict[str, float]:
    """The medians of the task's own figures, such as model utility, where all runs have them."""
    ends = [run.get("end", {}).get("figures", {}) for run in runs]
    return {
        name: round(statistics.median(end[name] for end in ends), 4)
        for name in ends[0]
        if all(name in end for end in ends)
    }


def is_ours(method: str) -> bool:
    """Whether it is one of MOLLM's directions, or a variant of one."""
    return method.split("+")[0] in {ours.name for ours in COMMON_DESCENT}


def verdict(rows: Sequence[Row], task: str) -> str:
    """The package's default against the best of the other methods, in a sentence.

    Intervals that overlap leave it open which is better, those of the difference over the same
    seeds tell more: what a seed draws is as hard for the one as for the other.
    """
    areas = {
        name: {run["seed"]: score(run) for run in runs}
        for name, runs in of_methods(rows, task).items()
    }
    order = sorted(areas, key=lambda name: -statistics.mean(areas[name].values()))
    other = next((name for name in order if not is_ours(name)), None)
    if other is None or DEFAULT not in areas:
        return ""
    means = {name: f"{name}, {statistics.mean(areas[name].values()):.3f}" for name in order}
    text = f"The package's default: {means[DEFAULT]}; best of the other methods: {means[other]}. "
    mine, theirs = areas[DEFAULT], areas[other]
    gains = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    intervals = map(interval, (list(mine.values()), list(theirs.values()), gains))
    known = [found for found in intervals if found is not None]
    if len(known) < 3:
        text += "Fewer than two seeds in common, so no interval."
    else:
        (low, high), (other_low, other_high), (least, most) = known
        apart = low > other_high or other_low > high
        text += (
            f"Their intervals {'do not overlap' if apart else 'overlap'}; the difference over the "
            f"same {len(gains)} seeds is {statistics.mean(gains):+.3f} ({least:+.3f} to "
            f"{most:+.3f})."
        )
    first = next(name for name in order if is_ours(name))
    return text if first == DEFAULT else f"{text} Best of MOLLM's directions here: {means[first]}."


def choice(rows: Sequence[Row]) -> list[Row]:
    """The hypervolume of each candidate for the default on each task of the choice, best mean
    first; of those that have been run on all."""
    areas = {task: {line["method"]: line for line in table(rows, task)} for task in CHOICE_TASKS}
    lines = []
    for name in CANDIDATES:
        if all(name in areas[task] for task in CHOICE_TASKS):
            each = {task: areas[task][name]["hypervolume"] for task in CHOICE_TASKS}
            conflicts = [areas[task][name]["update conflicts"] for task in CHOICE_TASKS]
            lines.append(
                {
                    "method": name,
                    **each,
                    "mean": statistics.mean(each.values()),
                    "update conflicts": statistics.mean(conflicts),
                }
            )
    return sorted(lines, key=lambda line: -line["mean"])


def printable(line: Row) -> Row:
    """The line as texts of a fixed form, for terminal and Markdown."""
    shown: Row = {"method": line["method"], "hypervolume": f"{line['hypervolume']:.3f}"}
    low_high = line["interval"]
    shown["95%"] = f"{low_high[0]:.3f}–{low_high[1]:.3f}" if low_high else "one seed"
    for name in ("forgotten", "retain", "heldout", "outside"):
        shown[name] = f"{line[name]:.3f}"
    for name in ("direction conflicts", "update conflicts"):
        shown[name] = f"{line[name]:.1%}"
    shown["gap"] = "→".join(f"{gap:.2f}" for gap in line["gap"])
    for name, value in line["figures"].items():
        shown[name.replace("_", " ")] = f"{value:.3g}"
    lr = f"{line['lr']:g}{'*' * line['edge']}{' w' * bool(line['warmup'])}"
    return {**shown, "lr": lr, "s": f"{line['seconds']:.2g}"}


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[line.get(column, "") for column in columns] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


_COLORS = ("#b3402f", "#2f6f9f", "#3c8352", "#7b4fa0", "#c07f1d", "#2f8f8f", "#8a5a44", "#d06ba0")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def pareto_plot(rows: Sequence[Row], task: str, path: Path) -> None:
    """Kept against forgotten: the mean course of every method at its best learning rate."""
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes = figure.subplots()
    chosen = of_methods(rows, task)
    order = [line["method"] for line in table(rows, task)]
    for place, name in enumerate(order):
        runs = chosen[name]
        columns = list(zip(*(points_of(run) for run in runs), strict=True))
        xs, ys = ([statistics.mean(p[i] for p in column) for column in columns] for i in (0, 1))
        color, mark = _COLORS[place % len(_COLORS)], _MARKS[place // len(_COLORS)]
        axes.plot(xs, ys, "-", color=color, lw=1, alpha=0.6)
        axes.plot(xs[-1:], ys[-1:], mark, color=color, ms=7, label=name)
    axes.set_xlabel("forgotten")
    axes.set_ylabel("kept, held out")
    axes.set_title(f"{task}: course and end (mark), mean over seeds", fontsize=10)
    save(figure, axes, path)


def save(figure: Figure, axes: Any, path: Path) -> None:
    """Writes a figure with the look that all of them share."""
    axes.grid(visible=True, color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
