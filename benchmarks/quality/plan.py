"""Which runs there are: tasks, methods, learning rates, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mollm.errors import UsageError
from mollm.methods import METHODS
from quality.case import Case
from quality.runs import Row

VARIED = (
    "dual+metric",
    "project+metric",
    "upgrad-unit+metric",
    "project+momentum",
    "upgrad+momentum",
)
"""`mollm` is upgrad+metric."""
ALL = (*METHODS, *VARIED)
OBJECTIVE_COUNTS = (2, 3, 4, 6, 8)
KINDS = ("facts", "tofu", "capitals", "tofu-full", "capitals-full")


@dataclass(frozen=True)
class TaskPlan:
    """The budget of one task, the same for every method."""

    steps: int
    warmup: int
    """The first of them, over which the learning rate rises; then it falls to 0."""
    lrs: tuple[float, ...]
    relearning_lr: float
    """Of the ten examples after a run."""
    methods: tuple[str, ...] = ALL


_PLANS = {
    "facts": TaskPlan(60, 0, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), 3e-3),
    "tofu": TaskPlan(20, 0, (5e-4, 1e-3, 2e-3), 1.5e-3),
    "tofu-full": TaskPlan(60, 0, (1e-5, 3e-5, 1e-4), 3e-5),
    "capitals": TaskPlan(
        12, 3, (8e-5, 16e-5), 2e-5, ("mollm", "sum", "pcgrad", "project", "npo", "ga")
    ),
    "capitals-full": TaskPlan(12, 3, (4e-5, 8e-5, 16e-5), 2e-5),
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
    """The steps, learning rates and methods of a task."""
    kind = kind_of(task)
    full = _PLANS[kind]
    if not quick:
        return full
    lrs, methods = full.lrs[1:2] or full.lrs, full.methods[: len(METHODS)]
    steps = _QUICK_STEPS[kind]
    return TaskPlan(steps, full.warmup * steps // full.steps, lrs, full.relearning_lr, methods)


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
        for method in methods or plan.methods:
            for lr in plan.lrs:
                what = {"task": task, "method": method, "lr": lr, "seed": seed}
                yield {**what, "steps": plan.steps, "warmup": plan.warmup}


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
