"""What a method is, and the forget loss that most of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm_ops import linear_uce_loss

ForgetLoss = Callable[[AnswerTokens, Callable[[], AnswerTokens]], Tensor]
"""A scalar to minimise on the forget batch, from the model's answers there and, where asked for,
the frozen original's. A mean divides by `AnswerTokens.tokens` or `AnswerTokens.sequences`."""


@dataclass(frozen=True)
class Method:
    """A loss on what is to be forgotten, and how its gradient meets those of KL and retain.

    Example:
        >>> mine = Method("mine", unlearning_cross_entropy, "project", (1.0, 10.0, 1.0))
        >>> mine.optimizer_options()["direction"]
        'project'
    """

    name: str
    forget_loss: ForgetLoss
    direction: str
    """A direction of MOLLMOptimizer."""
    preferences: tuple[float, float, float] | None = None
    """Weights of forget, kl and retain; None for directions without."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of MOLLMOptimizer. Without one the metric is Euclidean."""
    compares: bool = False
    """Whether the forget loss asks for the original's answers."""

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments for MOLLMOptimizer with the objectives forget, kl, retain."""
        return {
            "direction": self.direction,
            "preferences": self.preferences,
            "metric": "euclidean",
            **self.options,
        }


def unlearning_cross_entropy(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, eps: float = 1e-4
) -> Tensor:
    """UCE, see `mollm_ops.linear_uce_loss`: bounded, unlike ascent on the cross-entropy."""
    return linear_uce_loss(
        answers.hidden,
        answers.weight,
        answers.target,
        **answers.head_options,
        eps=eps,
        normalizer=answers.tokens,
    )


PREFERENCES = (1.0, 20.0, 1.0)
"""Weights of forget, kl and retain, for the directions that take any. The gradient of KL starts at
zero and stays the smallest of the three: at weight 1 the model drifts away from its original, and
answers other questions worse, long before the facts are forgotten."""


OBJECTIVES = ("forget", "kl", "retain")
"""Of a run with one set to forget and one to retain. Where there are several, each has an objective
of its own, "forget_alice" or "retain_code"; KL is that of all that is to be retained."""


def role_of_objective(name: str) -> str:
    """Which of the three an objective is.

    Example:
        >>> role_of_objective("retain_code")
        'retain'
    """
    return name.split("_")[0]
