"""Figures as differences from those of a model that never saw the forget set.

    NAME_relative = 100 (NAME − NAME of the retain-only model) / NAME of the retain-only model

in percent, as MUSE reports its figures; 0 is best. `privleak`, which is such a difference already,
has none.
"""

from __future__ import annotations

from dataclasses import replace

from mollm.errors import UsageError
from mollm.evaluation.summary import Estimate, Evaluation

RELATIVE = "_relative"
_ALREADY = ("privleak",)


def with_relative(found: Evaluation, retrained: Evaluation) -> Evaluation:
    """An evaluation with the relative difference of every figure that both have.

    Args:
        found: Of a model.
        retrained: Of the retain-only model, by the same suite; its own interval is not counted.

    Raises:
        UsageError: They have no figure in common.

    Example:
        >>> one = Evaluation((), {"mmlu": Estimate(0.4, 0.3, 0.5, 9)}, {})
        >>> other = Evaluation((), {"mmlu": Estimate(0.5, 0.4, 0.6, 9)}, {})
        >>> round(with_relative(one, other).value("mmlu_relative"))
        -20
    """
    shared = [name for name in found.estimates if name in retrained.estimates]
    if not shared:
        raise UsageError(
            f"retain-logs must be of a model evaluated by the same suite, but that has "
            f"{', '.join(retrained.estimates) or 'no figure'}: evaluate it by this one."
        )
    estimates, missing = dict(found.estimates), dict(found.missing)
    for name in shared:
        known = retrained.estimates[name].value
        if name in _ALREADY:
            continue
        if known == 0:
            missing[name + RELATIVE] = (
                f"{name}{RELATIVE} needs a retain-only model whose {name} is not 0."
            )
            continue
        own = found.estimates[name]
        ends = sorted(100 * (end - known) / known for end in (own.low, own.high))
        estimates[name + RELATIVE] = Estimate(
            100 * (own.value - known) / known, ends[0], ends[1], own.examples
        )
    return replace(found, estimates=estimates, missing=missing)
