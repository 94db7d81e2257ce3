"""WGA: gradient ascent in which a token counts by its likelihood.

    L = −mean_t w_t CE_t + CE_retain,   w_t = p(y_t | x, y_<t)^β,   β = 1

No gradient flows through the weights: what has become unlikely is pushed no further.

Source: Wang et al., arXiv 2502.19301, section 5.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def wga_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, beta: float = 1.0
) -> Tensor:
    """The first term of the equation above."""
    losses = answers.token_losses()
    weights = (-beta * losses.detach()).exp()
    return -(weights * losses).sum() / answers.tokens


WGA = Method("wga", wga_loss, "sum", (1.0, 0.0, 1.0), positive=())
