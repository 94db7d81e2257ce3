"""Which runs there are: tasks, methods, learning rates, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mollm.errors import UsageError
from mollm.methods import METHODS
from quality.case import Case
from quality.runs import Row

VARIED = tuple(
    f"{name}+{variant}"
    for name in ("dual", "project", "upgrad", "upgrad-unit")
    for variant in ("adam", "momentum")
)
ALL = (*METHODS, *VARIED)
OBJECTIVE_COUNTS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class TaskPlan:
    """The budget of one task, the same for every method."""

    steps: int
    lrs: tuple[float, ...]
    methods: tuple[str, ...]


def budget(task: str, quick: bool) -> TaskPlan:
    """The steps, learning rates and methods of a task."""
    kind = task.split("-")[0]
    full = {
        "facts": TaskPlan(60, (3e-4, 1e-3, 3e-3, 1e-2), ALL),
        "tofu": TaskPlan(20, (5e-4, 1.5e-3, 5e-3), ALL),
        "capitals": TaskPlan(12, (2e-5,), ("ga", "npo", "sum", "dual", "project", "upgrad-unit")),
    }[kind]
    if not quick:
        return full
    steps = {"facts": 20, "tofu": 10, "capitals": 4}[kind]
    return TaskPlan(steps, full.lrs[1:2] or full.lrs, full.methods[: len(METHODS)])


def tasks_of(kinds: Sequence[str], quick: bool) -> list[str]:
    """The tasks by name; `facts` is one for each number of objectives."""
    counts = (2, 4) if quick else OBJECTIVE_COUNTS
    facts = [f"facts-{count}" for count in counts]
    return [task for kind in kinds for task in (facts if kind == "facts" else [kind])]


def keys(
    task: str, seeds: Sequence[int], methods: Sequence[str] | None, quick: bool
) -> Iterator[Row]:
    """What identifies each run of a task, seed by seed."""
    plan = budget(task, quick)
    for seed in seeds:
        for method in methods or plan.methods:
            for lr in plan.lrs:
                yield {"task": task, "method": method, "lr": lr, "seed": seed, "steps": plan.steps}


def make_case(task: str, seed: int, data: Path | None, quick: bool, cache: Path) -> Case:
    """The case of a task; modules are loaded when they are needed.

    Raises:
        UsageError: The task tofu without its data.
    """
    kind, _, count = task.partition("-")
    if kind == "facts":
        from quality import facts

        return facts.make_case(int(count), seed)
    if kind == "capitals":
        from quality import capitals

        return capitals.make_case(seed)
    from quality import tofu

    if data is None:
        raise UsageError(
            "data must be given for the task tofu: a folder with the JSON lines of locuslab/TOFU."
        )
    return tofu.make_case(data, seed, tofu.QUICK if quick else tofu.SMALL, cache)
