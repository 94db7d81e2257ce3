"""How often the updates of a run were against an objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def conflict_rate(conflicts: Iterable[Mapping[str, bool]], name: str) -> float | None:
    """The share of the updates that were applied which did not descend on an objective.

    Args:
        conflicts: Those of each step by objective; empty where the step was skipped.
        name: The objective.

    Returns:
        From 0 to 1; None where no update was applied.

    Example:
        >>> conflict_rate([{"kl": True}, {}, {"kl": False}], "kl")
        0.5
    """
    applied = [each[name] for each in conflicts if each]
    return sum(applied) / len(applied) if applied else None
