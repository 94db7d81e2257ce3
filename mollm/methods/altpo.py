"""AltPO: DPO in which answers that the original makes up are preferred to those to be forgotten.

    L = −(2/β) mean_i log σ(β (r(x_i, y'_i) − r(x_i, y_i))) + CE_retain,   β = 0.1

as in `mollm.methods.dpo`. The original is shown question and answer and asked for another answer
that is plausible and states other facts; `samples` such answers are drawn for every row at
temperature 1, and each makes a row of its own. The wording of that request is this package's. For
rows with a column `alternate` no answers are made.

Source: Mekala et al., arXiv 2409.13474, equation 3 and section 4.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.dpo import dpo_loss
from mollm.methods.method import GENERATED, Method


def altpo_loss(
    answers: AnswerTokens,
    reference: Callable[[], AnswerTokens],
    *,
    beta: float = 0.1,
    samples: int = 5,
) -> Tensor:
    """The first term of the equation above; `samples` counts where the rows are made."""
    return dpo_loss(answers, reference, beta=beta)


ALTPO = Method(
    "altpo",
    altpo_loss,
    "sum",
    (1.0, 0.0, 1.0),
    compares=True,
    alternatives=GENERATED,
    positive=("beta", "samples"),
)
