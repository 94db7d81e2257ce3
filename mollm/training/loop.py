"""The unlearning loop: three losses, three gradients, one step that suits them all.

    forget   unlearning cross-entropy on the facts to forget        (bounded, unlike ascent on CE)
    kl       KL(original model ‖ model) on the answers to keep
    retain   cross-entropy on the answers to keep

The three are never added up: each has its own gradient, and MOLLMOptimizer combines those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from mollm.data.chat import Batch
from mollm.methods import ForgetLoss, find_method, unlearning_cross_entropy
from mollm.methods.method import OBJECTIVES
from mollm.models.forward import freeze_embeddings
from mollm.models.logits import check_logits
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.training.history import StepRecord, record_of
from mollm.training.objectives import Objectives
from mollm.training.reference_model import CopyReference, Reference
from mollm.training.step import accumulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sampler = Callable[[], tuple[Batch, Batch]]


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

    Raises:
        UsageError: The losses do not fit the model, see `mollm.models.logits.check_logits`.
    """
    chosen = find_method(method)
    check_logits(model)
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
