"""Forget losses that a method may be combined with, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.errors import UsageError
from mollm.methods.answers import AnswerTokens
from mollm.methods.gradient_ascent import negative_cross_entropy
from mollm.methods.method import ForgetLoss
from mollm.methods.npo import npo_loss
from mollm.methods.simnpo import simnpo_loss

LOSSES: dict[str, ForgetLoss] = {
    "graddiff": negative_cross_entropy,
    "npo": npo_loss,
    "simnpo": simnpo_loss,
}
"""With the hyperparameters that are their defaults."""


def chosen_loss(name: str, answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """The loss of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in LOSSES:
        raise UsageError(f"loss must be one of {', '.join(LOSSES)}, but got {name!r}.")
    return LOSSES[name](answers, reference)
