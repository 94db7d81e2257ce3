"""The synthetic facts, forgotten so that they stay forgotten: K objectives with relearning."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mollm.methods import find_method
from mollm.training.relearning import relearnt
from quality.case import Case
from quality.facts import relearning_apart
from quality.runs import Row, Schedule, optimizer_of


def unlearned(case: Case, settings: Mapping[str, Any], seed: int) -> tuple[nn.Module, Row]:
    """A copy of the case's model that has unlearned, and what the run says of itself.

    With `relearn_steps` one half of each batch to forget is relearnt, and the other forgotten
    where that led, see `mollm.training.relearning`; the halves are drawn anew in every step.
    """
    rng = random.Random(f"batches {seed}")
    model = copy.deepcopy(case.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    method, lr = find_method(settings["method"]), settings["learning_rate"]
    optimizer = optimizer_of(case, model, method, lr)
    steps, relearn_steps = settings["max_steps"], settings.get("relearn_steps", 0)
    schedule = LambdaLR(optimizer, functools.partial(Schedule(lr).share, steps=steps))
    forget, *kept = case.objectives
    conflicts, began = 0, time.perf_counter()
    for _ in range(steps):
        batches = case.draw(rng)
        relearning: Any = nullcontext()
        optimizer.zero_grad()
        if relearn_steps:
            batches, taught = relearning_apart(batches, rng)

            def backward(taught: Any = taught) -> None:
                torch.autograd.backward(case.answers(model, taught).cross_entropy())

            relearning = relearnt(trained, backward, steps=relearn_steps, lr=settings["relearn_lr"])
        with relearning, optimizer.objective(forget):
            answers = case.answers(model, batches[forget])
            original = functools.partial(case.answers, case.model, batches[forget])
            torch.autograd.backward(method.forget_loss(answers, torch.no_grad()(original)))
        for name in kept:
            with optimizer.objective(name):
                torch.autograd.backward(case.answers(model, batches[name]).cross_entropy())
        optimizer.step()
        conflicts += any((optimizer.last_step.conflicts or {}).values())
        schedule.step()
    seconds = round(time.perf_counter() - began, 2)
    return model, {"seconds": seconds, "conflicts": conflicts / steps, "failed": None}
