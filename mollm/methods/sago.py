"""SAGO: element by element, forgetting moves a weight only where it does not oppose retaining.

    d_j = c_f g_f,j  where g_f,j g_r,j ≥ 0,   else   c_r g_r,j;   c_f = c_r = 1

with g_f the gradient of the forget loss, −CE or another one (`loss`: graddiff, npo, or simnpo with
its γ = 1/8), and g_r that of CE_retain. What the gate takes away is gone before norms, cosines and
conflicts of a step are measured.

Source: Xiao et al., arXiv 2604.14808.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.compatible import check_loss, chosen_loss
from mollm.methods.method import Method, role_of_objective


def sago_loss(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, loss: str = "graddiff"
) -> Tensor:
    """The forget loss of that name."""
    return chosen_loss(loss, answers, reference)


def sign_gate(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of the objectives' gradients of one parameter."""

    def total(role: str) -> Tensor:
        some = [g for name, g in gradients.items() if role_of_objective(name) == role]
        return torch.stack(some).sum(0)

    # By signs: a product of small numbers may vanish.
    opposed = total("forget").sign() * total("retain").sign() < 0
    kept = {"forget": ~opposed, "retain": opposed}
    return {
        name: torch.where(kept[role], g, 0.0) if (role := role_of_objective(name)) in kept else g
        for name, g in gradients.items()
    }


SAGO = Method(
    "sago",
    sago_loss,
    "sum",
    (1.0, 0.0, 1.0),
    compares=True,
    gate=sign_gate,
    checks={"loss": check_loss},
)
