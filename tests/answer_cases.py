"""Answer tokens in float64 that losses of methods are checked on."""

from __future__ import annotations

from dataclasses import replace

import torch

from mollm.methods import AnswerTokens

LENGTHS = (3, 1, 4)


def answers(seed):
    """Three answers of 3, 1 and 4 tokens whose rows are not in order."""
    torch.manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    hidden = (torch.randn(8, 5, dtype=torch.float64) / 4).requires_grad_()
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    target = torch.arange(8) % 11
    made = AnswerTokens(hidden, weight, bias, target, sequence[order], 3)
    made = replace(made, states=hidden.repeat(1, 2).cumsum(1))
    return made if seed > 9 else replace(made, alternative=answers(seed + 10))


def per_sequence(a, squares):
    means = [squares[a.sequence == i].mean() for i in range(3)]
    return sum(means) / 3
