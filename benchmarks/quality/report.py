"""The study as Markdown, with its figures beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from quality import plan
from quality.checks import Check
from quality.plan import CHOICE_SEEDS
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
  has the same sweep of learning rates, on the capitals with and without a warm-up of three steps
  (`w`); the best by the mean over seeds is shown, with a star where it is the smallest or largest
  rate of the sweep. As that choice is made on the seeds shown, areas are slightly optimistic, for
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
    source: Row,
) -> None:
    """Writes study.md and figures/*.png into `folder`."""
    parts = [_INTRODUCTION]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    parts.append(
        f"Device: {source['device']}. Versions: {versions}. Commit: {source['commit']}. "
        f"Date: {source['date']}. The commands whose runs are shown:\n"
    )
    commands = [row["command"] for row in rows if "command" in row]
    commands = list(dict.fromkeys([*commands, source["command"]]))
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
        parts.append(
            f"The package's default is `{DEFAULT}`, for what [Choosing the default]"
            "(#choosing-the-default) shows.\n"
        )
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


def _choice(candidates: Sequence[Row]) -> str:
    heading = "## Choosing the default\n\n"
    seeds = f"seeds {CHOICE_SEEDS[0]} to {CHOICE_SEEDS[-1]}"
    if not candidates:
        return f"{heading}Not run for this page: `--seeds` with {seeds}.\n"
    first, default = candidates[0], next(c for c in candidates if c["method"] == DEFAULT)
    sentence = (
        f"The hypervolume of MOLLM's directions and their variants on draws that no other table "
        f"has ({seeds}, as many as were run), each on its best schedule. "
        f"`{first['method']}` has the highest mean, {first['mean']:.3f}"
    )
    if first is not default:
        sentence += (
            f"; the default, `{DEFAULT}`, has {default['mean']:.3f}, with "
            f"{default['update conflicts']:.1%} of its updates in conflict against "
            f"{first['update conflicts']:.1%}"
        )
    shown = [
        {
            name: f"{value:.1%}" if "conflicts" in name else f"{value:.3f}"
            for name, value in line.items()
            if name != "method"
        }
        | {"method": line["method"]}
        for line in candidates
    ]
    order = ["method", *(name for name in candidates[0] if name != "method")]
    lines = [{name: line[name] for name in order} for line in shown]
    return f"{heading}{sentence}.\n\n{markdown(lines)}"


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
