"""A training loop as a user writes one: the package's step, and nothing around it."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR

from mollm import MOLLMOptimizer
from mollm.methods import find_method, unlearning_cross_entropy
from mollm.methods.method import OBJECTIVES
from mollm.models.forward import freeze_embeddings
from mollm.training.history import record_of
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CopyReference
from mollm.training.step import accumulate


def descend(
    model, reference, optimizer, forget, retain, forget_loss=unlearning_cross_entropy
) -> dict[str, float]:
    """One step; the three losses before it."""
    optimizer.zero_grad()
    losses = accumulate(Objectives(model, reference, forget_loss), optimizer, forget, retain)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def unlearn(model, draw, *, steps, lr, method="dual", **options):
    """Steps of AdamW on two batches each, at a rate that falls to 0; a record of each."""
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
        losses = descend(model, reference, optimizer, *draw(), forget_loss=chosen.forget_loss)
        schedule.step()
        yield record_of(step, rate, losses, optimizer)
