"""CE-U: the model learns its own distribution without the answer's token.

    L = mean_t H(softmax(z_t with −∞ at y_t), softmax(z_t)),   H the cross-entropy

The target distribution is constant: no gradient flows through it. The first token of every answer
is left out (`ignore_first`), as the paper's footnote on training has it. There is no retain loss.

Source: Yang, arXiv 2503.01224.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method
from mollm.methods.on_logits import summed


def ceu_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, ignore_first: bool = True
) -> Tensor:
    """The equation above."""
    counted = torch.ones_like(answers.target, dtype=torch.bool)
    tokens = answers.tokens
    if ignore_first:
        counted = ~answers.firsts()
        tokens = torch.as_tensor(tokens - answers.sequences).clamp(min=1)

    def loss(logits: Tensor, target: Tensor, places: Tensor) -> Tensor:
        rows = torch.arange(len(target), device=target.device)
        without = logits.detach().clone()
        without[rows, target] = -torch.inf
        losses = -(without.softmax(1) * logits.log_softmax(1)).sum(1)
        return torch.where(counted[places], losses, 0.0)

    total = summed(answers, loss)
    return total / (tokens.to(total) if isinstance(tokens, Tensor) else tokens)


CEU = Method("ceu", ceu_loss, "sum", (1.0, 0.0, 0.0))
