"""The study as Markdown, with its figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quality.checks import Check
from quality.runs import Row
from quality.summary import markdown, pareto_plot

_INTRODUCTION = """\
# Does it forget well?

Written by `benchmarks/unlearning_quality.py`; every figure comes from the runs of that script.

- **Score.** *Forgotten* is 1 − P/P₀ on the forget set and *kept* is P/P₀ on facts of the same kind
  that training never touched (held out); P is the geometric mean probability of an answer's tokens,
  P₀ that of the original model. The *hypervolume* is the area dominated by a run's course in the
  plane of the two: 1 would be to forget all and lose nothing.
- **Fairness.** All methods take the same number of steps of AdamW with the same batches, and each
  has the same sweep of learning rates; the best by the mean over seeds is shown. As that choice is
  made on the seeds shown, areas are slightly optimistic, for all methods alike. The weights of the
  losses were not tuned: (1, 20, 1) for forget, KL and retain as in the demo, (1, 1, …, 1) for the
  synthetic facts.
- **Intervals** are 95% bootstrap intervals of the mean over seeds. A seed draws facts or authors,
  the model and the batches. With two seeds the ends are little more than the two values: they show
  the spread and are no test of a difference.
- **Conflicts**: the share of steps, averaged over objectives, in which the direction, or the update
  that the optimizer really made, does not descend on an objective. The direction of a run with
  `+momentum` is judged by the running means that it is made of.
- `dual` has no row for unit gradients: the centre of the cone does not depend on their norms.
"""
_TITLES = {
    "facts": "Synthetic facts, {} objectives",
    "tofu": "TOFU forget10 on a small Llama",
    "capitals": "Capitals of SmolLM2",
}


def write(
    folder: Path,
    tables: Mapping[str, Sequence[Row]],
    checks: Sequence[Check],
    rows: Sequence[Row],
    source: Row,
) -> None:
    """Writes study.md and figures/*.png into `folder`."""
    parts = [_INTRODUCTION]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    parts.append(
        f"Device: {source['device']}. Versions: {versions}. Commit: {source['commit']}. "
        f"Date: {source['date']}. Command:\n\n    {source['command']}\n"
    )
    missing = [kind for kind in _TITLES if not any(task.startswith(kind) for task in tables)]
    if missing:
        parts.append(f"Not run for this page: {', '.join(missing)}.\n")
    for task, lines in tables.items():
        kind, _, count = task.partition("-")
        pareto_plot(rows, task, folder / "figures" / f"{task}.png")
        parts.append(f"## {_TITLES[kind].format(count)}\n")
        parts.append(_about(task, lines, rows))
        parts.append(f"![kept against forgotten](figures/{task}.png)\n")
        parts.append(markdown(lines))
    if checks:
        parts.append("## Checks and open questions\n")
    for check in checks:
        check.draw(folder / "figures" / f"check-{check.name}.png")
        parts.append(f"### {check.title}\n\n{check.sentence}\n")
        parts.append(f"![{check.title}](figures/check-{check.name}.png)\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.md").write_text("\n".join(parts))


def _about(task: str, lines: Sequence[Row], rows: Sequence[Row]) -> str:
    run = next(row for row in rows if row["task"] == task)
    lrs = sorted({row["lr"] for row in rows if row["task"] == task})
    seeds = sorted({line["seeds"] for line in lines})
    return (
        f"{run['steps']} steps, learning rates {', '.join(f'{lr:g}' for lr in lrs)}, "
        f"{' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} seeds, "
        f"{run['parameters']} parameters, objectives: {', '.join(run['objectives'])}.\n"
    )
