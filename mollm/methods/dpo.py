"""DPO: another answer is preferred to the one that is to be forgotten.

    L = −(2/β) mean_i log σ(β (r(x_i, y'_i) − r(x_i, y_i))) + CE_retain,   β = 0.1

with r(x, y) = log π(y | x) − log π_ref(y | x), sums over an answer's tokens. The alternative
answers y' are the data's column `alternate`; `idkdpo` and `altpo` bring them along.

Source: Rafailov et al., arXiv 2305.18290, equation 7, with the factor 2/β of
Zhang et al., arXiv 2404.05868, and of open-unlearning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mollm.errors import UsageError
from mollm.methods.answers import AnswerTokens
from mollm.methods.method import GIVEN, Method


def dpo_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, beta: float = 0.1
) -> Tensor:
    """The first term of the equation above.

    Raises:
        UsageError: The rows have no alternative answers.
    """
    with torch.no_grad():
        original = reference()
    if answers.alternative is None or original.alternative is None:
        raise UsageError(
            "rows to forget must have alternative answers for a method that prefers these, but "
            "some have none: give them to the trainer, with a column alternate."
        )
    gained = answers.alternative.log_likelihoods() - original.alternative.log_likelihoods()
    kept = answers.log_likelihoods() - original.log_likelihoods()
    return -2 / beta * logsigmoid(beta * (gained - kept)).sum() / answers.sequences


DPO = Method("dpo", dpo_loss, "sum", (1.0, 0.0, 1.0), compares=True, alternatives=GIVEN)
