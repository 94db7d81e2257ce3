"""Schedules and options of an optimizer, as a checkpoint holds them and a resumed run sets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that a checkpoint holds; the rate is that of the schedule."""
    left = ("params", "lr", "initial_lr", "rounding_seed")
    return {n: v for n, v in group.items() if n not in left and not isinstance(v, Tensor)}


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    return {name: value for name, value in state.items() if name != "lr_lambdas"}


def take_schedule(scheduler: Any, state: Mapping[str, Any], optimizer: Any) -> None:
    """Sets a schedule to the step that a checkpoint reached, at the rates of this run's settings.

    One that is no function of the step goes on as it was.
    """
    if not isinstance(scheduler, LambdaLR):
        scheduler.load_state_dict(dict(state))
        return
    scheduler.last_epoch = step = int(state["last_epoch"])
    scheduler._step_count = int(state["_step_count"])
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(step) for base, factor in rates]
    for group, base, rate in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler._last_lr, strict=True
    ):
        group["initial_lr"], group["lr"] = base, rate
