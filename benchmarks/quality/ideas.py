"""What others found to last longer, tried in place of the package's forget loss or direction.

margin   mean over tokens of max(0, log p/(1 − p) + m): does not flatten out where p is near 1 or 0
         (arXiv 2607.27836)
floor    −mean over answers of min(L, floor), L the mean negative log-likelihood of their tokens:
         ends where an answer is as unlikely as wrong ones are to the original
pcd      the direction nearest to the forget gradient that descends enough on every other objective,
         min ½|d − g_1|²  subject to  g_k · d ≥ τ |g_k|²   (arXiv 2606.29521)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

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


def nearest_with_a_margin(gram: Tensor, tau: float = 0.5) -> Tensor:
    """d = g_1 + Σ_k λ_k g_k. As many constraints are active, λ_k > 0, as are needed for all to
    hold; with G the Gram matrix of the others, G λ = τ diag G − G_1 on the active ones."""
    others = gram[1:, 1:]
    missing = tau * others.diagonal() - gram[1:, 0]
    slack = 1e-9 * others.diagonal()
    for count in range(len(missing) + 1):
        for active in map(list, combinations(range(len(missing)), count)):
            found = torch.zeros_like(missing)
            if active:
                solved = torch.linalg.lstsq(others[active][:, active], missing[active, None])
                found[active] = solved.solution[:, 0]
            if bool((found >= 0).all() and (others @ found >= missing - slack).all()):
                return torch.cat([torch.ones_like(found[:1]), found])
    return torch.cat([torch.ones_like(missing[:1]), missing.clamp(min=0) / others.diagonal()])


_DEFAULT = METHODS["mollm"]
IDEAS: dict[str, Method] = {
    "margin": replace(_DEFAULT, name="margin", forget_loss=margin_on_log_odds),
    "floor": replace(_DEFAULT, name="floor", forget_loss=ascent_to_a_floor),
    "pcd": replace(_DEFAULT, name="pcd", direction=nearest_with_a_margin, preferences=None),  # type: ignore[arg-type]
}
"""As the default but for the loss, or for the direction."""
