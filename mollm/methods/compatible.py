"""Forget losses that a method may be combined with, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.errors import UsageError, did_you_mean
from mollm.methods.answers import AnswerTokens
from mollm.methods.gradient_ascent import negative_cross_entropy
from mollm.methods.method import ForgetLoss
from mollm.methods.npo import npo_loss
from mollm.methods.simnpo import SIMNPO, simnpo_loss


def _weighted_simnpo(answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """With its γ, which in the method of that name is the preference of the forget loss."""
    assert SIMNPO.preferences is not None, "γ is among them"
    return SIMNPO.preferences[0] * simnpo_loss(answers, reference)


LOSSES: dict[str, ForgetLoss] = {
    "graddiff": negative_cross_entropy,
    "npo": npo_loss,
    "simnpo": _weighted_simnpo,
}
"""With the published hyperparameters, γ = 1/8 of SimNPO included."""


def chosen_loss(name: str, answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """The loss of that name, one of LOSSES."""
    return LOSSES[name](answers, reference)


def check_loss(name: str) -> None:
    """Says that there is no loss of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in LOSSES:
        hint = did_you_mean(name, LOSSES)
        raise UsageError(f"loss must be one of {', '.join(LOSSES)}, but got {name!r}{hint}")
