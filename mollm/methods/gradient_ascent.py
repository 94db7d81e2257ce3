"""Gradient ascent on the cross-entropy of the forget set, and nothing else.

    L = −CE_forget

It has no lower bound: the further the model is from an answer, the harder it is pushed.

Source: Jang et al., Knowledge unlearning for mitigating privacy risks in language models,
arXiv 2210.01504, equation 2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mollm.methods.answers import AnswerTokens
from mollm.methods.method import Method


def negative_cross_entropy(answers: AnswerTokens, reference: Callable[[], AnswerTokens]) -> Tensor:
    """−CE, averaged over the answer tokens."""
    return -answers.cross_entropy()


GRADIENT_ASCENT = Method("ga", negative_cross_entropy, "sum", (1.0, 0.0, 0.0))
