"""SimNPO: negative preference optimization by length-normalised likelihood, without a reference.

    L = −γ (2/β) mean_i log σ(−(β/|y_i|) log π(y_i | x_i) − δ) + CE_retain

with β = 4.5, δ = 0 and γ = 1/8, the values that open-unlearning uses on TOFU.

Source: Fan et al., arXiv 2410.07163, equation 4.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def simnpo_loss(
    answers: AnswerTokens,
    reference: Callable[[], AnswerTokens],
    *,
    beta: float = 4.5,
    delta: float = 0.0,
) -> Tensor:
    """The first term of the equation above, without γ. Every sequence needs an answer token."""
    normalised = answers.log_likelihoods() / answers.lengths()
    gains = logsigmoid(-beta * normalised - delta)
    return -2 / beta * gains.sum() / answers.sequences


SIMNPO = Method("simnpo", simnpo_loss, "sum", (0.125, 0.0, 1.0))
