"""Ways to unlearn by name: a loss on what is to be forgotten, and options of MOLLMOptimizer.

All of them take the same training step, `mollm.training.step.accumulate`: the gradients of KL and
of the cross-entropy on the retain batch are computed for every method, and one that does without a
loss gives it the preference 0.
"""

from mollm.methods.altpo import ALTPO
from mollm.methods.answers import AnswerTokens, LossDenominators, answers_of, sequences_of
from mollm.methods.ceu import CEU
from mollm.methods.common_descent import COMMON_DESCENT
from mollm.methods.dpo import DPO
from mollm.methods.dual_optim import DUAL_OPTIM
from mollm.methods.forget_first import FORGET_FIRST
from mollm.methods.graddiff import GRADDIFF
from mollm.methods.gradient_ascent import GRADIENT_ASCENT
from mollm.methods.idkdpo import IDKDPO
from mollm.methods.method import ForgetLoss, Method, RetainLoss, Seen, unlearning_cross_entropy
from mollm.methods.mgda import MGDA
from mollm.methods.npo import NPO
from mollm.methods.pcgrad import PCGRAD
from mollm.methods.pdu import PDU
from mollm.methods.retain_first import RETAIN_FIRST
from mollm.methods.rmu import RMU
from mollm.methods.sago import SAGO
from mollm.methods.satimp import SATIMP
from mollm.methods.simnpo import SIMNPO
from mollm.methods.task_arithmetic import TASK_ARITHMETIC
from mollm.methods.undial import UNDIAL
from mollm.methods.weighted_sum import WEIGHTED_SUM
from mollm.methods.wga import WGA

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        GRADIENT_ASCENT,
        GRADDIFF,
        NPO,
        SIMNPO,
        DPO,
        IDKDPO,
        ALTPO,
        UNDIAL,
        WGA,
        SATIMP,
        CEU,
        PDU,
        RMU,
        TASK_ARITHMETIC,
        SAGO,
        DUAL_OPTIM,
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
    "RetainLoss",
    "Seen",
    "answers_of",
    "find_method",
]
__all__ += ["sequences_of", "unlearning_cross_entropy"]
