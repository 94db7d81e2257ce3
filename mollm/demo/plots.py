"""Figures of a run, drawn from its history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mollm.methods.method import OBJECTIVES
from mollm.training.history import StepRecord

COLORS = {"forget": "#b3402f", "kl": "#2f6f9f", "retain": "#3c8352"}
_PAIR_COLORS = ("#7b4fa0", "#c07f1d", "#2f8f8f")
_DPI = 160

History = Sequence[StepRecord]


def save_figures(history: History, folder: Path) -> list[Path]:
    """Writes losses.png, cosines.png, weights.png and conflicts.png into `folder`."""
    drawings: dict[str, Callable[[History], Figure]] = {
        "losses": losses,
        "cosines": cosines,
        "weights": weights,
        "conflicts": conflicts,
    }
    paths = []
    for name, draw in drawings.items():
        path = folder / f"{name}.png"
        # Without the writer's version in it, the same run gives the same file.
        draw(history).savefig(path, dpi=_DPI, metadata={"Software": None})
        paths.append(path)
    return paths


def losses(history: History) -> Figure:
    """The three losses before each step, one panel each: their scales differ."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(OBJECTIVES)), OBJECTIVES, strict=True):
        axes.plot(_steps(history), [r.losses[name] for r in history], color=COLORS[name], lw=1.8)
        axes.set_title(name, color=COLORS[name], fontsize=11, fontweight="bold")
        if all(r.losses[name] >= 0 for r in history):
            axes.set_ylim(bottom=0)
        _tidy(axes, "loss" if name == OBJECTIVES[0] else "")
    return figure


def cosines(history: History) -> Figure:
    """Cosines between the gradients of each pair of objectives."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.6", lw=0.8)
    for pair, color in zip(history[0].cosines, _PAIR_COLORS, strict=True):
        values = [r.cosines[pair] for r in history]
        axes.plot(_steps(history), values, color=color, lw=1.8, label=pair.replace("·", " · "))
    axes.set_ylim(-1.02, 1.02)
    _tidy(axes, "cosine")
    _legend(axes)
    return figure


def weights(history: History) -> Figure:
    """The length of each objective's part in the direction, w_k |g_k|."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.6", lw=0.8)
    for name in OBJECTIVES:
        values = [r.weights[name] * r.norms[name] for r in history]
        axes.plot(_steps(history), values, color=COLORS[name], lw=1.8, label=name)
    _tidy(axes, "w · |g|")
    _legend(axes)
    return figure


def conflicts(history: History) -> Figure:
    """Pareto gap, and the steps whose update did not descend on an objective."""
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    gap, raster = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    gap.plot(_steps(history), [r.pareto_gap for r in history], color="0.25", lw=1.8)
    gap.set_ylim(0, 1.02)
    _tidy(gap, "Pareto gap")
    gap.set_xlabel("")
    for row, name in enumerate(reversed(OBJECTIVES)):
        hits = [r.step + 1 for r in history if r.conflicts.get(name)]
        raster.plot(_steps(history), [row] * len(history), ".", color="0.85", ms=4)
        raster.plot(hits, [row] * len(hits), "s", color=COLORS[name], ms=7)
    raster.set_yticks(range(len(OBJECTIVES)), reversed(OBJECTIVES))
    raster.set_ylim(-0.6, len(OBJECTIVES) - 0.4)
    _tidy(raster, "conflicts")
    raster.grid(visible=False)
    return figure


def _steps(history: History) -> list[int]:
    return [record.step + 1 for record in history]


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)


def _tidy(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
