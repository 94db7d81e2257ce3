"""Options of MOLLMOptimizer that would do nothing beside the others: refused in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mollm.optim.constants import PER_OBJECTIVE
from mollm.optim.directions import Direction, uses_length, uses_normalize

MEAN_BETA, NORMALIZE, LENGTH = 0.9, False, "mean"
"""What these options are where nobody chose them."""
FIRST_BETA = "the first of betas"
_NO_FIRST = (0, 0.9)
"""β₁ where there is no first moment: as it is by default, or as that says itself."""


class IdleOptionError(ValueError):
    """An option that somebody chose does nothing beside the others."""

    def __init__(self, name: str, beside: str, value: Any, instead: str) -> None:
        super().__init__(f"{name} must be left out {beside}, but got {value!r}: {instead}.")
        self.name = name
        self.beside = beside
        """The others, as they follow "must be left out"."""
        self.value = value
        self.instead = instead
        """The way out."""


def refuse_idle_options(
    direction: Direction, *, normalize: bool, length: str, momentum: Any, mean_beta: float
) -> None:
    """Refuses options of the direction and of the running means that would do nothing.

    Raises:
        IdleOptionError: There is one.
    """
    given = {
        "mean_beta": (mean_beta, MEAN_BETA),
        "normalize": (normalize, NORMALIZE),
        "length": (length, LENGTH),
    }
    for name, beside, instead in _idle(direction, bool(normalize), momentum):
        value, usual = given[name]
        if value != usual:
            raise IdleOptionError(name, beside, value, instead)


def refuse_idle_first_beta(betas: Sequence[Any] | None) -> None:
    """Refuses a β₁ that somebody chose for a base that keeps no first moment.

    Raises:
        IdleOptionError: There is one.
    """
    if betas is not None and betas[0] not in _NO_FIRST:
        beside = "in AdamW's metric and with per-objective momentum, where there is no first moment"
        instead = "leave it at 0.9, or choose metric='euclidean' without per-objective momentum"
        raise IdleOptionError(FIRST_BETA, beside, betas[0], instead)


def _idle(direction: Direction, normalize: bool, momentum: Any) -> Iterator[tuple[str, str, str]]:
    """(option, beside what it does nothing, the way out)."""
    told = direction if isinstance(direction, str) else "that is given"
    if momentum != PER_OBJECTIVE:
        yield "mean_beta", "without momentum='per-objective'", "add that"
    if not uses_normalize(direction):
        yield "normalize", f"with the direction {told}, which does that anyway", "leave it out"
    if not uses_length(direction, normalize):
        other = ", or add normalize=True" if uses_length(direction, True) else ""
        beside = f"with the direction {told}, where it changes nothing"
        yield "length", beside, f"leave it out{other}"
