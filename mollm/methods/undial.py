"""UNDIAL: the model learns its original's distribution with the answer's logit lowered.

    L = mean_t H(softmax(z_ref,t − β e_{y_t}), softmax(z_t)),   H the cross-entropy,   β = 10

There is no retain loss: weights of forget, KL and retain are 1, 0 and 0. The mean is over answer
tokens; open-unlearning's is over prompts and padding too.

Source: Dong et al., arXiv 2402.10052, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method
from mollm.methods.on_logits import logits_of, summed


def undial_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, beta: float = 10.0
) -> Tensor:
    """The equation above."""
    with torch.no_grad():
        original = reference()

    def loss(logits: Tensor, target: Tensor, places: Tensor) -> Tensor:
        with torch.no_grad():
            lowered = logits_of(original, places).to(logits.dtype)
            lowered[torch.arange(len(target), device=target.device), target] -= beta
            taught = lowered.softmax(1)
        return -(taught * logits.log_softmax(1)).sum(1)

    return summed(answers, loss) / answers.tokens


UNDIAL = Method("undial", undial_loss, "sum", (1.0, 0.0, 0.0), compares=True)
