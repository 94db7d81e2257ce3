"""The unlearning loop: three losses, three gradients, one step that suits them all.

    forget   unlearning cross-entropy on the facts to forget        (bounded, unlike ascent on CE)
    kl       KL(original model ‖ model) on the answers to keep
    retain   cross-entropy on the answers to keep

The three are never added up: each has its own gradient, and MOLLMOptimizer combines those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from mollm.chat import Batch
from mollm.folder import replace_text
from mollm.methods import ForgetLoss, find_method, unlearning_cross_entropy
from mollm.models import freeze_embeddings
from mollm.objectives import Objectives
from mollm.optimizer import MOLLMOptimizer
from mollm.references import CopyReference, Reference
from mollm.step import OBJECTIVES, accumulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sampler = Callable[[], tuple[Batch, Batch]]


@dataclass(frozen=True)
class StepRecord:
    """One step, as history.jsonl holds it. Objectives stand in the order of OBJECTIVES."""

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


def descend(
    model: PreTrainedModel,
    reference: Reference,
    optimizer: MOLLMOptimizer,
    forget: Batch,
    retain: Batch,
    forget_loss: ForgetLoss = unlearning_cross_entropy,
) -> dict[str, float]:
    """One step on one batch of facts to forget and one of answers to keep.

    Args:
        model: The model to change.
        reference: The original.
        optimizer: Optimizer with the three OBJECTIVES.
        forget: Batch whose answer tokens are to become unlikely.
        retain: Batch whose answers are to stay as they are.
        forget_loss: What to minimise on the forget batch.

    Returns:
        The three losses before the step.
    """
    optimizer.zero_grad()
    objectives = Objectives(model, reference, forget_loss)
    losses = accumulate(objectives, optimizer, forget, retain)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def unlearn(
    model: PreTrainedModel,
    sample: Sampler,
    *,
    steps: int,
    lr: float,
    method: str = "dual",
    **options: Any,
) -> Iterator[StepRecord]:
    """Changes `model` in place, and yields a record after each step.

    The learning rate falls linearly from `lr` to 0: near the end UCE has almost no gradient left,
    and AdamW, which normalises its steps, would otherwise keep walking at full speed. Embeddings
    and head stay as they are, see `freeze_embeddings`.

    Args:
        model: The model to change; a frozen copy of it serves as the reference.
        sample: Gives the forget and the retain batch of the next step.
        steps: Number of steps.
        lr: Learning rate of AdamW at the first step.
        method: One of mollm.methods.METHODS. Gradients that it does not use are measured only.
        **options: Of MOLLMOptimizer, before those of the method.
    """
    chosen = find_method(method)
    reference = CopyReference(model)
    freeze_embeddings(model)
    optimizer = MOLLMOptimizer(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        objectives=OBJECTIVES,
        base="adamw",
        **{"weight_decay": 0.0, **chosen.optimizer_options(), **options},
    )
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        rate = float(schedule.get_last_lr()[0])
        losses = descend(model, reference, optimizer, *sample(), forget_loss=chosen.forget_loss)
        schedule.step()
        yield record_of(step, rate, losses, optimizer)


def pairs() -> list[tuple[int, int]]:
    """Index pairs of the objectives."""
    count = len(OBJECTIVES)
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def record_of(
    step: int, lr: float, losses: dict[str, float], optimizer: MOLLMOptimizer
) -> StepRecord:
    """What the optimizer's last step did; waits for the device."""
    last = optimizer.last_step
    return StepRecord(
        step=step,
        lr=lr,
        losses=losses,
        norms=dict(zip(OBJECTIVES, map(float, last.norms), strict=True)),
        cosines={f"{OBJECTIVES[i]}·{OBJECTIVES[j]}": float(last.cosines[i, j]) for i, j in pairs()},
        weights=dict(zip(OBJECTIVES, map(float, last.weights), strict=True)),
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
    for name in OBJECTIVES:
        means |= {
            f"{name}_loss": mean(record.losses[name] for record in records),
            f"norm_{name}": mean(record.norms[name] for record in records),
            f"weight_{name}": mean(record.weights[name] for record in records),
            f"conflict_{name}": mean(record.conflicts.get(name, False) for record in records),
        }
    for i, j in pairs():
        a, b = OBJECTIVES[i], OBJECTIVES[j]
        means[f"cosine_{a}_{b}"] = mean(record.cosines[f"{a}·{b}"] for record in records)
    means["pareto_gap"] = mean(record.pareto_gap for record in records)
    return means


def write_history(history: Iterable[StepRecord], path: Path) -> None:
    """Writes one JSON object for each step; a number that is not finite becomes null."""
    lines = [json.dumps(finite(record.as_dict()), ensure_ascii=False) for record in history]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
