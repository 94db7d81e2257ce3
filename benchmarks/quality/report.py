"""The study as Markdown, with its figures beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from quality import plan
from quality.checks import Check
from quality.plan import CHOICE_SEEDS, CHOICE_TASKS
from quality.runs import Row
from quality.summary import DEFAULT, markdown, pareto_plot, printable, verdict

_INTRODUCTION = """\
# Does it forget well?

Written by `benchmarks/unlearning_quality.py` from all runs in its folder; every figure comes from
the runs of that script.

- **Score.** *Forgotten* is 1 − P/P₀ on the forget set and *kept* is P/P₀ on facts of the same kind
  that training never touched (held out); P is the geometric mean probability of an answer's tokens,
  P₀ that of the original model. The *hypervolume* is the area dominated by a run's course in the
  plane of the two: 1 would be to forget all and lose nothing.
- **Fairness.** All methods take the same number of steps of AdamW with the same batches, and each
  has the same sweep of learning rates, on the capitals with a warm-up of three steps (`w`); the
  best by the mean over seeds is shown, with a star where it is the smallest or largest rate of the
  sweep. As that choice is made on the seeds shown, areas are slightly optimistic, for
  all methods alike. The weights of the losses were not tuned: (1, 20, 1) for forget, KL and retain
  as in the demo, (1, 1, …, 1) for the synthetic facts.
- **Intervals** are Student's 95% intervals of the mean over seeds, of the differences over the same
  seeds. A seed draws facts or authors, the model and the batches.
- **Conflicts**: the share of steps, averaged over objectives, in which the direction, or the update
  that the optimizer really made, does not descend on an objective. The direction of a run with
  `+momentum` is judged by the running means that it is made of; that of `mollm` and of a run with
  `+metric`, and its gap, in AdamW's metric.
- **Forget quality and model utility** (TOFU) are those of `mollm evaluate` at the end of a run,
  medians over seeds: the p-value of the Kolmogorov–Smirnov test against a model that never learnt
  the forget set, and the harmonic mean of nine figures on retained rows, real authors and world
  facts.
- **s**: seconds of all steps of a run, the median over seeds.
- `dual` has no row for unit gradients: the centre of the cone does not depend on their norms.
- **Larger, on a GPU**: `--tasks tofu-full capitals-full --data FOLDER` has SmolLM2 learn all 4000
  rows of TOFU, unlearns the 400 of forget10, retains two thirds of the authors of retain90, holds
  out the others; and runs the capitals with every method and learning rate. `--model` names another
  model.
"""
_TITLES = {
    "facts": "Synthetic facts, {} objectives",
    "tofu": "TOFU forget10 on a small Llama",
    "capitals": "Capitals of SmolLM2",
    "tofu-full": "TOFU in full on SmolLM2",
    "capitals-full": "Capitals of SmolLM2, every method and learning rate",
}


def title_of(task: str) -> str:
    """The heading of a task."""
    return _TITLES[plan.kind_of(task)].format(task.removeprefix("facts-"))


def write(
    folder: Path,
    tables: Mapping[str, Sequence[Row]],
    candidates: Sequence[Row],
    checks: Sequence[Check],
    rows: Sequence[Row],
    made: Sequence[Row],
    source: Row,
) -> None:
    """Writes study.md and figures/*.png into `folder`.

    Args:
        folder: Where to.
        tables: The table of each task.
        candidates: The table of the candidates for the default.
        checks: What was checked.
        rows: The runs of the tables.
        made: All runs that are shown in some way.
        source: Where and when the page is written.
    """
    parts = [_INTRODUCTION]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    commits, dates = (
        ", ".join(sorted({row[what] for row in made if what in row})) for what in ("commit", "date")
    )
    parts.append(
        f"Device: {source['device']}. Versions: {versions}. Commits of the runs: {commits}; of "
        f"this page: {source['commit']}. Dates: {dates}. The commands whose runs are shown:\n"
    )
    commands = dict.fromkeys(row["command"] for row in [*made, source] if "command" in row)
    parts.append("\n".join(f"    {command}" for command in commands) + "\n")
    missing = [kind for kind in _TITLES if kind not in map(plan.kind_of, tables)]
    if missing:
        parts.append(f"Not run for this page: {', '.join(missing)}.\n")
    for task, lines in tables.items():
        pareto_plot(rows, task, folder / "figures" / f"{task}.png")
        parts.append(f"## {title_of(task)}\n")
        parts.append(_about(task, lines, rows))
        parts.append(f"{verdict(rows, task)}\n")
        parts.append(f"![kept against forgotten](figures/{task}.png)\n")
        parts.append(markdown(list(map(printable, lines))))
        parts.append(_why(candidates))
    parts.append(_choice(candidates))
    if checks:
        parts.append("## Checks and open questions\n")
    for title in dict.fromkeys(check.title for check in checks):
        parts.append(f"### {title}\n")
        for check in (check for check in checks if check.title == title):
            file = f"figures/check-{check.name}-{check.task}.png"
            check.draw(folder / file)
            parts.append(f"**{title_of(check.task)}.** {check.sentence}\n")
            parts.append(f"![{title}, {check.task}]({file})\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.md").write_text("\n".join(parts), encoding="utf-8")


def _why(candidates: Sequence[Row]) -> str:
    """Which candidate became the default."""
    free = [line["method"] for line in candidates if line["update conflicts"] == 0]
    if DEFAULT not in free[:1]:
        return f"The package's default is `{DEFAULT}`.\n"
    return (
        f"The package's default is `{DEFAULT}`: of the directions whose updates never conflict it "
        "has the largest hypervolume where the default was [chosen](#choosing-the-default).\n"
    )


def _choice(candidates: Sequence[Row]) -> str:
    heading = "## Choosing the default\n\n"
    seeds = f"seeds {CHOICE_SEEDS[0]} to {CHOICE_SEEDS[-1]}"
    if not candidates:
        return f"{heading}Not run for this page: {', '.join(CHOICE_TASKS)} with {seeds}.\n"
    first = candidates[0]
    text = (
        "The hypervolume of MOLLM's directions and their variants on draws that no other table "
        f"has ({seeds}; TOFU with the first), each on its best schedule. "
        f"`{first['method']}` has the highest mean, {first['mean']:.3f}"
    )
    default = next((line for line in candidates if line["method"] == DEFAULT), first)
    if default is not first:
        text += (
            f"; the default, `{DEFAULT}`, has {default['mean']:.3f}, with "
            f"{default['update conflicts']:.1%} of its updates in conflict against "
            f"{first['update conflicts']:.1%}"
        )
        if first["method"].endswith("+momentum"):
            text += ", and without a running mean of every gradient as state"
    shown = [
        {"method": line["method"]}
        | {name: f"{value:.3f}" for name, value in line.items() if isinstance(value, float)}
        | {"update conflicts": f"{line['update conflicts']:.1%}"}
        for line in candidates
    ]
    return f"{heading}{text}.\n\n{markdown(shown)}"


def _about(task: str, lines: Sequence[Row], rows: Sequence[Row]) -> str:
    runs = [row for row in rows if row["task"] == task]
    rates = dict.fromkeys(f"{row['lr']:g}{' w' * bool(row.get('warmup'))}" for row in runs)
    steps = sorted({row["steps"] for row in runs})
    seeds = sorted({line["seeds"] for line in lines})
    known = statistics.mean(row["original"]["forget"] for row in runs)
    text = (
        f"{' or '.join(map(str, steps))} steps, learning rates {', '.join(rates)}, "
        f"{' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} "
        f"{'seed' if seeds[-1] == 1 else 'seeds'}, "
        f"{runs[0]['parameters']} parameters, objectives: {', '.join(runs[0]['objectives'])}. "
        f"The original gives the answers to forget a likelihood of {known:.2f}.\n"
    )
    if "figures of" in runs[-1]:
        compared = "; ".join(
            ", ".join(f"{name.replace('_', ' ')} {v:.3g}" for name, v in figures.items())
            + f" ({whose})"
            for whose, figures in runs[-1]["figures of"].items()
        )
        text += f"For comparison, of the last seed: {compared}.\n"
    return text
