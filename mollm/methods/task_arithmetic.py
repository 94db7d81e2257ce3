"""Task arithmetic: the model learns the forget set by heart, and that change is turned around.

    θ_ft = argmin CE_forget, from θ₀;   θ = θ₀ − α (θ_ft − θ₀),   α = 1

The subtraction comes after the last step: losses, evaluations and checkpoints of the run are those
of θ_ft, and the model that is exported is θ. Of a LoRA adapter, whose change of a matrix is s B A,
B is multiplied by −α. MUSE takes α = 5 after ten epochs at 1e-5.

Source: Ilharco et al., arXiv 2212.04089, section 3; as a rival in MUSE, arXiv 2407.06460.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def learning_loss(answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """CE of the forget set, to be minimised."""
    return answers.cross_entropy()


def negated(trained: Tensor, before: Tensor, *, scale: float = 1.0) -> Tensor:
    """θ₀ − α (θ_ft − θ₀)."""
    return before - scale * (trained - before)


TASK_ARITHMETIC = Method(
    "task-arithmetic",
    learning_loss,
    "sum",
    (1.0, 0.0, 0.0),
    finish=negated,
    positive=("scale",),
)
