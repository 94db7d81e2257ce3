"""SatImp: gradient ascent in which a token counts by its saturation and its importance.

    L = −mean_t w_t CE_t + 0.1 CE_retain,   w_t = p_t^β₁ (1 − p_t)^β₂,   β₁ = 5,   β₂ = 1

with p_t = p(y_t | x, y_<t). No gradient flows through the weights.

Source: Yang et al., arXiv 2505.11953, whose retain loss counts a tenth of the forget loss: so does
their code, and open-unlearning's class for SatImp. Its configuration file has the two weights the
other way round, a tenth for the forget loss, which `preferences=(0.1, 0, 1)` gives.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def satimp_loss(
    answers: AnswerTokens,
    reference: Callable[[], AnswerTokens],
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
) -> Tensor:
    """The first term of the equation above."""
    losses = answers.token_losses()
    known = losses.detach()
    weights = (-beta1 * known).exp() * (-(-known).expm1()).pow(beta2)
    return -(weights * losses).sum() / answers.tokens


SATIMP = Method("satimp", satimp_loss, "sum", (1.0, 0.0, 0.1))
