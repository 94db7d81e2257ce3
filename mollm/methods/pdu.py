"""PDU: flat logits on the forget set, under a constraint on the retain loss.

    L = mean_t (max_v z_tv − mean_v z_tv)² + λ (CE_retain − ε)
    λ ← max(0, λ + η (CE_retain − ε))   after each step, from epoch `warmup_epochs` on

with λ = 100 at first, η = 5, ε = 0.3 and 5 epochs, the authors' values on TOFU. ε must suit the
model: somewhat more than its retain loss is before unlearning. With several sets to retain each has
its own λ.

Source: Entesari et al., arXiv 2506.05314, problem 5 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method, Seen, Weights, role_of_objective
from mollm.methods.on_logits import summed


def flattening_loss(answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """The first term of the equation above."""

    def loss(logits: Tensor, target: Tensor, places: Tensor) -> Tensor:
        return (logits.amax(1) - logits.mean(1)).square()

    return summed(answers, loss) / answers.tokens


def dual_step(
    now: Weights,
    first: Weights,
    seen: Seen | None,
    *,
    retain_loss_eps: float = 0.3,
    dual_step_size: float = 5.0,
    warmup_epochs: float = 5.0,
) -> Weights:
    """λ after a step."""
    if seen is None or seen.epoch < warmup_epochs:
        return now
    return now | {
        name: max(0.0, weight + dual_step_size * (seen.losses[name] - retain_loss_eps))
        for name, weight in now.items()
        if role_of_objective(name) == "retain" and math.isfinite(seen.losses[name])
    }


PDU = Method("pdu", flattening_loss, "sum", (1.0, 0.0, 100.0), adapt=dual_step)
