"""The best checkpoint of a run, by one of the losses of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from mollm.data.sets import role_of
from mollm.errors import UsageError

if TYPE_CHECKING:
    from transformers import TrainerState

    from mollm.training.config import MOLLMConfig


def check_metric(args: MOLLMConfig, sets: Iterable[str]) -> None:
    """Refuses a metric_for_best_model that an evaluation on these sets does not give.

    Raises:
        UsageError: It does not.
    """
    losses = [
        loss
        for name in sorted(sets)
        for loss in (("kl", name) if role_of(name) == "retain" else (name,))
    ]
    _refuse_other(
        _metric_of(args), [*dict.fromkeys(f"eval_{loss}_loss" for loss in losses), "eval_loss"]
    )


def note_if_best(args: MOLLMConfig, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """Whether these metrics are the best so far, which `state` then tells.

    Raises:
        UsageError: They have no such metric, as those of an overridden `evaluate` may.
    """
    name = _metric_of(args)
    if name is None:
        return False
    _refuse_other(name, metrics)
    value, best = metrics[name], state.best_metric
    better = math.isfinite(value) and (
        best is None or (value > best if args.greater_is_better else value < best)
    )
    if better:
        state.best_metric = value
        state.best_global_step = state.global_step
    return better


def _metric_of(args: MOLLMConfig) -> str | None:
    """As `evaluate` names it."""
    name: str | None = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def _refuse_other(name: str | None, known: Collection[str]) -> None:
    if name is not None and name not in known:
        raise UsageError(
            f"metric_for_best_model must be one of {', '.join(known)}, but got {name!r}."
        )
