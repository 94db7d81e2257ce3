"""DualOptim+: forget steps and retain steps in turns, with moments of their own and shared ones.

One step along the gradient of the forget loss is followed by `retain_steps` along that of
CE_retain, with the optimizer `mollm.optim.dual_optim.DualOptimPlus`, where its equations stand.
`loss` names the forget loss (graddiff, npo, or simnpo with its γ = 1/8). Every step draws rows of
both sets and logs both losses; only one of the two moves the weights.

Source: Zhong et al., arXiv 2605.21539; defaults are those of the authors' scripts on TOFU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mollm.errors import UsageError
from mollm.methods.answers import AnswerTokens
from mollm.methods.compatible import check_loss, chosen_loss
from mollm.methods.method import Method, Seen, Weights, role_of_objective
from mollm.optim.dual_optim import DualOptimPlus


def dual_optim_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, loss: str = "npo"
) -> Tensor:
    """The forget loss of that name."""
    return chosen_loss(loss, answers, reference)


def in_turns(
    now: Weights,
    first: Weights,
    seen: Seen | None,
    *,
    forget_steps: int = 1,
    retain_steps: int = 5,
) -> Weights:
    """The weights at the start for the objectives whose turn it is, and 0 for the others."""
    place = (0 if seen is None else seen.applied) % (forget_steps + retain_steps)
    forgets = place < forget_steps
    return {
        name: weight if (role_of_objective(name) == "forget") == forgets else 0.0
        for name, weight in first.items()
    }


def _check_betas(name: str, pair: Any) -> None:
    """Says now what the optimizer would say once the model is loaded."""
    numbers = all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in pair)
    if len(pair) != 2 or not numbers:
        raise UsageError(f"{name} must be two numbers from 0 to below 1, but got {pair!r}.")


DUAL_OPTIM = Method(
    "dualoptim-plus",
    dual_optim_loss,
    "sum",
    (1.0, 0.0, 1.0),
    {"base": DualOptimPlus},
    compares=True,
    adapt=in_turns,
    base_options={
        "forget_steps": 1,
        "retain_steps": 5,
        "forget_lr_ratio": 1.0,
        "betas": (0.9, 0.95),
        "base_betas": (0.9, 0.95),
        "eps": 1e-8,
    },
    positive=("forget_steps", "retain_steps", "forget_lr_ratio", "eps"),
    checks={
        "loss": check_loss,
        "betas": partial(_check_betas, "betas"),
        "base_betas": partial(_check_betas, "base_betas"),
    },
)
