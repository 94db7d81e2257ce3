"""One run of one method on one case, and the file that keeps the runs that are done."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mollm import MOLLMOptimizer
from mollm.methods import Method, find_method, unlearning_cross_entropy
from mollm.methods.method import OBJECTIVES
from mollm.system.parsing import parse_json_lines
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CopyReference
from mollm.training.step import accumulate
from mollm_ops import linear_cross_entropy
from mollm_ops.dual_space import active_objectives
from quality.case import Batches, Case, measure

Row = dict[str, Any]
POINTS = 10
"""How often a run is measured."""
VARIANTS: Mapping[str, dict[str, Any]] = {
    "metric": {"metric": "base"},
    "momentum": {"momentum": "per-objective"},
    "unit": {"normalize": True},
    "min-norm": {"length": "min-norm"},
}


@dataclass(frozen=True)
class Schedule:
    """Of the learning rate: over `warmup` steps it rises to `lr`, in the others it falls to 0."""

    lr: float
    warmup: int = 0

    def share(self, done: int, steps: int) -> float:
        """Of `lr`, in the step after `done` of `steps`."""
        return min((done + 1) / (self.warmup + 1), (steps - done) / (steps - self.warmup))


def schedule_of(row: Row) -> Schedule:
    """That of a run."""
    return Schedule(row["lr"], row.get("warmup", 0))


def method_of(name: str) -> Method:
    """A method by name, with variants of the optimizer after it: "project-unit+metric"."""
    base, *variants = name.split("+")
    method = find_method(base)
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, but got {variant!r}.")
        method = replace(method, name=name, options={**method.options, **VARIANTS[variant]})
    return method


def settings_of(method: Method) -> str:
    """All that makes a method, so that runs of another state of it are not taken for its own."""
    loss: Any = method.forget_loss
    options = {**method.optimizer_options()}
    if getattr(loss, "func", loss) is unlearning_cross_entropy:
        options["eps"] = inspect.signature(loss).parameters["eps"].default
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()))


def optimizer_of(case: Case, model: nn.Module, method: Method, lr: float) -> MOLLMOptimizer:
    """AdamW without weight decay along the method's direction."""
    options = method.optimizer_options()
    preferences = method.preferences
    if preferences is not None and case.objectives != OBJECTIVES:
        forget, _, retain = preferences
        options["preferences"] = [forget] + [retain] * (len(case.objectives) - 1)
    return MOLLMOptimizer(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        objectives=case.objectives,
        base="adamw",
        weight_decay=0.0,
        **options,
    )


def stepper(
    case: Case, model: nn.Module, optimizer: MOLLMOptimizer, method: Method
) -> Callable[[Batches], None]:
    """The package's own step; with other objectives than its three, one cross-entropy for each."""
    forget_name, *kept = case.objectives

    def descend_on_each(batches: Batches) -> None:
        optimizer.zero_grad()
        original = torch.no_grad()(
            functools.partial(case.answers, case.model, batches[forget_name])
        )
        with optimizer.objective(forget_name):
            answers = case.answers(model, batches[forget_name])
            torch.autograd.backward(method.forget_loss(answers, original))
        for name in kept:
            with optimizer.objective(name):
                answers = case.answers(model, batches[name])
                loss = linear_cross_entropy(
                    answers.hidden, answers.weight, answers.target, **answers.head_options
                )
                torch.autograd.backward(loss)
        optimizer.step()

    if case.objectives != OBJECTIVES:
        return descend_on_each
    language_model: Any = model
    objectives = Objectives(language_model, CopyReference(language_model), method.forget_loss)

    def descend_on_three(batches: Batches) -> None:
        optimizer.zero_grad()
        accumulate(objectives, optimizer, batches["forget"], batches["retain"])
        optimizer.step()

    return descend_on_three


def unlearned(
    case: Case, method: Method, *, lr: float, steps: int, warmup: int, seed: int
) -> tuple[nn.Module, Row]:
    """Unlearns on a copy of the case's model.

    Returns:
        The changed model and the record of the run: curves at POINTS places, conflict rates of the
        direction, (G w)_k < 0, and of the update really applied, Pareto gaps, gradient norms.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"batches {seed}")
    model = copy.deepcopy(case.model)
    on_gpu = next(model.parameters()).is_cuda
    optimizer = optimizer_of(case, model, method, lr)
    step = stepper(case, model, optimizer, method)
    share = functools.partial(Schedule(lr, warmup).share, steps=steps)
    schedule = LambdaLR(optimizer, share)
    points = min(POINTS, steps)
    measured = {round(i * steps / points) for i in range(1, points + 1)}
    curve: list[dict[str, float]] = [{"step": 0, **measure(case, model, case.groups)}]
    turned = {what: torch.zeros(len(case.objectives)) for what in ("direction", "update")}
    gaps, norms, skipped, seconds = [], [], 0, 0.0
    for number in range(1, steps + 1):
        batches = case.draw(rng)
        started = time.perf_counter()
        step(batches)
        schedule.step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        last = optimizer.last_step
        gaps.append(round(last.pareto_gap, 4))
        norms.append([float(f"{norm:.3g}") for norm in last.norms.tolist()])
        if last.conflicts is None:
            skipped += 1
        else:
            against = _harmed(last.gram.cpu(), last.weights.cpu())
            turned["direction"] += against.float()
            turned["update"] += torch.tensor(list(last.conflicts.values())).float()
        if number in measured:
            curve.append({"step": number, **measure(case, model, case.groups)})
    taken = max(steps - skipped, 1)
    rates = {f"{what} conflicts": (n / taken).tolist() for what, n in turned.items()}
    places = sorted({0, *(m - 1 for m in measured)})
    return model, {
        "curve": [{k: round(v, 5) for k, v in point.items()} for point in curve],
        "original": {name: round(value, 5) for name, value in case.original.items()},
        **{name: [round(x, 4) for x in rate] for name, rate in rates.items()},
        "gaps": [gaps[i] for i in places],
        "norms": [norms[i] for i in places],
        "skipped": skipped,
        "seconds": round(seconds, 3),
    }


def _harmed(gram: Tensor, weights: Tensor) -> Tensor:
    """[K]: g_k · d < 0 beyond rounding. A direction on the edge of the dual cone harms nobody."""
    length = (weights @ gram @ weights).clamp(min=0).sqrt()
    rounding = 1e-9 * gram.diagonal().sqrt() * length
    return (gram @ weights < -rounding) & active_objectives(gram)


class RunFile:
    """Runs as JSON lines, appended one by one, so that a study that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            lines = [line for line in path.read_text().split("\n") if line.endswith("}")]
            self.rows = [row for _, row in parse_json_lines("\n".join(lines), str(path))]
        self._done = {self._key(row) for row in self.rows}

    @staticmethod
    def _kind(row: Row) -> tuple[Any, ...]:
        """What a run is, but for its seed. One of before settings were kept is like no other."""
        which = row["task"], row["method"], row.get("settings")
        return *which, row["steps"], schedule_of(row)

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return *RunFile._kind(row), row["seed"]

    def has(self, key: Row) -> bool:
        """Whether there is a run of this task, method, settings, seed and schedule."""
        return self._key(key) in self._done

    def of(self, task: str, method: str) -> list[Row]:
        """The runs of a method on a task, those like the last one but for the seed."""
        mine = [row for row in self.rows if (row["task"], row["method"]) == (task, method)]
        return [row for row in mine if self._kind(row) == self._kind(mine[-1])]

    def add(self, row: Row) -> None:
        """Writes one run at the end of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(row) + "\n")
        self.rows.append(row)
        self._done.add(self._key(row))
