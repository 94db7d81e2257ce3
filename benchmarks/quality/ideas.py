"""Forget losses that others found to last longer, tried in place of the package's.

margin   mean over tokens of max(0, log p/(1 − p) + m): does not flatten out where p is near 1 or 0
         (arXiv 2607.27836)
floor    −mean over answers of min(L, floor), L the mean negative log-likelihood of their tokens:
         ends where an answer is as unlikely as wrong ones are to the original
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mollm.methods import METHODS, AnswerTokens, Method


def margin_on_log_odds(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, margin: float = 8.0
) -> Tensor:
    """Falls until the log-odds of every token are −margin."""
    log_p = -answers.token_losses()
    odds = log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))
    return torch.relu(odds + margin).sum() / answers.tokens


def ascent_to_a_floor(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, floor: float = 3.0
) -> Tensor:
    """Falls until the mean loss of every answer is the floor."""
    losses = -answers.log_likelihoods() / answers.lengths()
    return -losses.clamp(max=floor).sum() / answers.sequences


IDEAS: dict[str, Method] = {
    name: replace(METHODS["mollm"], name=name, forget_loss=loss)
    for name, loss in (("margin", margin_on_log_odds), ("floor", ascent_to_a_floor))
}
"""As the default but for the loss."""
