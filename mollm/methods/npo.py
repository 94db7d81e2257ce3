"""Negative preference optimization, with the cross-entropy of the retain set.

    L = −(2/β) mean_i log σ(−β (log π(y_i | x_i) − log π_ref(y_i | x_i))) + CE_retain,   β = 0.1

Log-likelihoods are sums over the answer's tokens. The gradient is that of ascent, scaled for each
sequence by 2 r^β / (1 + r^β) with r = π/π_ref, so that it fades once a sequence has become less
likely than it was.

Source: Zhang et al., arXiv 2404.05868, equation 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def npo_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, beta: float = 0.1
) -> Tensor:
    """The first term of the equation above."""
    with torch.no_grad():
        original = reference().log_likelihoods()
    gains = logsigmoid(-beta * (answers.log_likelihoods() - original))
    return -2 / beta * gains.sum() / answers.sequences


NPO = Method("npo", npo_loss, "sum", (1.0, 0.0, 1.0), compares=True)
