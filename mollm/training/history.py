"""What every step did: records, their means, and the file that holds them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mollm.optim.optimizer import MOLLMOptimizer
from mollm.system.folders import replace_text
from mollm_ops import Status


@dataclass(frozen=True)
class StepRecord:
    """One step, as history.jsonl holds it. Objectives stand in the order of the run."""

    step: int
    lr: float
    losses: dict[str, float]
    """The losses before the step; `forget` is that of the method, UCE for most."""
    norms: dict[str, float]
    """Gradient norms."""
    cosines: dict[str, float]
    """Cosine of each pair of gradients, such as "forget·kl"; 0 where a gradient is zero."""
    weights: dict[str, float]
    """Weights w of the combined gradient Σ w_k g_k."""
    status: str
    pareto_gap: float
    changes: dict[str, float]
    """g_k · Δθ: to first order, what the update really applied did to each loss; empty where the
    step was skipped because a gradient was not finite."""
    conflicts: dict[str, bool]
    """True where that update does not descend."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def record_of(
    step: int, lr: float, losses: dict[str, float], optimizer: MOLLMOptimizer
) -> StepRecord:
    """What the optimizer's last step did; waits for the device."""
    last, names = optimizer.last_step, optimizer.objectives
    return StepRecord(
        step=step,
        lr=lr,
        losses=losses,
        norms=dict(zip(names, map(float, last.norms), strict=True)),
        cosines={
            f"{a}·{b}": float(last.cosines[i, j])
            for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
        },
        weights=dict(zip(names, map(float, last.weights), strict=True)),
        status=last.status.name,
        pareto_gap=float(last.pareto_gap),
        changes=last.changes or {},
        conflicts=last.conflicts or {},
    )


def means_of(records: Sequence[StepRecord]) -> dict[str, float]:
    """What some steps did, on average; a conflict counts as 1."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(records)

    means = {"loss": mean(sum(record.losses.values()) for record in records)}
    first = records[0]
    for name in first.losses:
        means |= {
            f"{name}_loss": mean(record.losses[name] for record in records),
            f"grad_norm_{name}": mean(record.norms[name] for record in records),
            f"objective_weight_{name}": mean(record.weights[name] for record in records),
            f"conflict_{name}": mean(record.conflicts.get(name, False) for record in records),
        }
    for pair in first.cosines:
        means[f"cosine_{pair.replace('·', '_')}"] = mean(r.cosines[pair] for r in records)
    means["pareto_gap"] = mean(record.pareto_gap for record in records)
    return means


def skipped_in(records: Iterable[StepRecord]) -> int:
    """How many steps were skipped because a gradient was not finite."""
    return sum(record.status == Status.NON_FINITE.name for record in records)


def write_history(history: Iterable[StepRecord], path: Path) -> None:
    """Writes one JSON object for each step; a number that is not finite becomes null."""
    lines = [json.dumps(nan_to_none(record.as_dict()), ensure_ascii=False) for record in history]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def nan_to_none(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
