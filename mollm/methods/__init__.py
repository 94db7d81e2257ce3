"""Ways to unlearn by name: a loss on what is to be forgotten, and options of MOLLMOptimizer.

All of them take the same training step, `mollm.training.step.accumulate`: the gradients of KL and
of the cross-entropy on the retain batch are computed for every method, and one that does without a
loss gives it the preference 0.
"""

from mollm.methods.answers import AnswerTokens, LossDenominators, answers_of, sequences_of
from mollm.methods.common_descent import COMMON_DESCENT
from mollm.methods.forget_first import FORGET_FIRST
from mollm.methods.graddiff import GRADDIFF
from mollm.methods.gradient_ascent import GRADIENT_ASCENT
from mollm.methods.method import ForgetLoss, Method, unlearning_cross_entropy
from mollm.methods.mgda import MGDA
from mollm.methods.npo import NPO
from mollm.methods.pcgrad import PCGRAD
from mollm.methods.retain_first import RETAIN_FIRST
from mollm.methods.simnpo import SIMNPO
from mollm.methods.weighted_sum import WEIGHTED_SUM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        GRADIENT_ASCENT,
        GRADDIFF,
        NPO,
        SIMNPO,
        WEIGHTED_SUM,
        PCGRAD,
        MGDA,
        RETAIN_FIRST,
        FORGET_FIRST,
        *COMMON_DESCENT,
    )
}
"""Every method by its name."""


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: There is none.

    Example:
        >>> find_method("mollm").direction
        'upgrad'
        >>> find_method("mol")
        Traceback (most recent call last):
        ValueError: method must be one of ga, graddiff, ...
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but got {name!r}.")
    return METHODS[name]


__all__ = [
    "METHODS",
    "AnswerTokens",
    "ForgetLoss",
    "LossDenominators",
    "Method",
    "answers_of",
    "find_method",
]
__all__ += ["sequences_of", "unlearning_cross_entropy"]
