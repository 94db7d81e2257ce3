"""Which runs there are: tasks, methods, schedules, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mollm.errors import UsageError
from mollm.methods import METHODS
from mollm.methods.common_descent import COMMON_DESCENT
from quality.case import Case
from quality.runs import Row, Schedule, method_of, schedule_of, settings_of

VARIED = (
    "dual+metric",
    "project+metric",
    "upgrad-unit+metric",
    "project+momentum",
    "upgrad+momentum",
)
"""`mollm` is upgrad+metric."""
LOSSES = tuple(name for name, method in METHODS.items() if method.is_a_loss)
"""The methods that a step of the study can make."""
ALL = (*LOSSES, *VARIED)
CANDIDATES = (
    *(method.name for method in COMMON_DESCENT),
    *VARIED,
    "mollm+momentum",
    "mollm+unit",
    "mollm+min-norm",
)
"""Among which the package's default is chosen."""
CHOICE_SEEDS = range(10, 15)
CHOICE_TASKS = ("facts-2", "facts-4", "facts-8", "tofu")
"""The runs that the default is chosen by; no other table has those seeds."""
OBJECTIVE_COUNTS = (2, 3, 4, 6, 8)
KINDS = ("facts", "tofu", "capitals", "tofu-full", "capitals-full")


@dataclass(frozen=True)
class TaskPlan:
    """The budget of one task, the same for every method."""

    steps: int
    sweep: tuple[Schedule, ...]
    """Every method runs at each of them."""
    relearning_lr: float
    """Of the ten examples after a run."""
    methods: tuple[str, ...] = ALL


def _rates(*lrs: float, warmup: int = 0) -> tuple[Schedule, ...]:
    return tuple(Schedule(lr, warmup) for lr in lrs)


_PLANS = {
    "facts": TaskPlan(60, _rates(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), 3e-3),
    "tofu": TaskPlan(20, _rates(5e-4, 1e-3, 2e-3, 4e-3), 1.5e-3),
    "tofu-full": TaskPlan(60, _rates(1e-5, 3e-5, 1e-4), 3e-5),
    "capitals": TaskPlan(
        12,
        _rates(8e-5, 16e-5, warmup=3),
        2e-5,
        ("mollm", "sum", "pcgrad", "npo", "ga", "project"),
    ),
    "capitals-full": TaskPlan(12, _rates(4e-5, 8e-5, 16e-5, 32e-5, warmup=3), 2e-5),
}
_QUICK_STEPS = {"facts": 20, "tofu": 10, "tofu-full": 10, "capitals": 4, "capitals-full": 4}


@dataclass(frozen=True)
class Means:
    """What a case is made with."""

    data: Path | None
    """TOFU's files."""
    model: str | None
    """What the large tasks start from; None for SmolLM2."""
    device: torch.device
    """Of all tasks but the synthetic facts, which are too small for any but the CPU."""
    cache: Path
    """Where models and answers are kept that took long to make."""
    quick: bool


def kind_of(task: str) -> str:
    """`facts` for `facts-4`; other tasks are their own kind."""
    return task if task in KINDS else task.split("-")[0]


def budget(task: str, quick: bool) -> TaskPlan:
    """The steps, schedules and methods of a task."""
    kind = kind_of(task)
    full = _PLANS[kind]
    if not quick:
        return full
    return TaskPlan(
        _QUICK_STEPS[kind], full.sweep[1:2], full.relearning_lr, full.methods[: len(LOSSES)]
    )


def tasks_of(kinds: Sequence[str], quick: bool) -> list[str]:
    """The tasks by name; `facts` is one for each number of objectives."""
    counts = (2, 4) if quick else OBJECTIVE_COUNTS
    facts = [f"facts-{count}" for count in counts]
    return [task for kind in kinds for task in (facts if kind == "facts" else [kind])]


def all_tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks of these runs, in the order of KINDS, facts by their number of objectives."""

    def place(task: str) -> tuple[int, int]:
        count = task.removeprefix("facts-")
        return KINDS.index(kind_of(task)), int(count) if count.isdigit() else 0

    return sorted({row["task"] for row in rows}, key=place)


def keys(
    task: str, seeds: Sequence[int], methods: Sequence[str] | None, quick: bool
) -> Iterator[Row]:
    """What identifies each run of a task, seed by seed."""
    plan = budget(task, quick)
    for seed in seeds:
        for method in methods or (CANDIDATES if seed in CHOICE_SEEDS else plan.methods):
            for schedule in plan.sweep:
                key = {"task": task, "method": method, "seed": seed, "steps": plan.steps}
                yield {**key, **asdict(schedule), "settings": settings_of(method_of(method))}


def of_tables_and_choice(rows: Sequence[Row], quick: bool) -> tuple[list[Row], list[Row]]:
    """The runs of the tables and those that the default is chosen by.

    Runs of an earlier plan, with other steps, another sweep or other settings of a method, are in
    neither.
    """
    plans = {task: budget(task, quick) for task in {row["task"] for row in rows}}
    planned = [
        row
        for row in rows
        if row["steps"] == plans[row["task"]].steps
        and schedule_of(row) in plans[row["task"]].sweep
        and row.get("settings") == settings_of(method_of(row["method"]))
    ]
    return (
        [row for row in planned if row["seed"] not in CHOICE_SEEDS],
        [row for row in planned if row["seed"] in CHOICE_SEEDS],
    )


def make_case(task: str, seed: int, means: Means) -> Case:
    """The case of a task; modules are loaded when they are needed.

    Raises:
        UsageError: A task of TOFU without its data.
    """
    kind = kind_of(task)
    if kind == "facts":
        from quality import facts

        return facts.make_case(int(task.split("-")[1]), seed)
    if kind.startswith("capitals"):
        from quality import capitals

        return capitals.make_case(seed, means.model, means.device, means.cache)
    from quality import tofu

    if means.data is None:
        raise UsageError(
            f"data must be given for the task {task}: a folder with the JSON lines of "
            "locuslab/TOFU."
        )
    size = {
        ("tofu", False): tofu.SMALL,
        ("tofu", True): tofu.QUICK,
        ("tofu-full", False): tofu.full(means.model),
        ("tofu-full", True): tofu.quick_full(means.model),
    }[kind, means.quick]
    return tofu.make_case(means.data, seed, size, means.device, means.cache)
