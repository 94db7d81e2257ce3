"""One training step: two forward passes of the model, three backward passes, three gradients.

    forget batch    one forward, one backward
    retain batch    one forward, shared by KL and cross-entropy; a backward for each

and the original model's final hidden states on the retain batch, see `mollm.references`. Losses
read hidden states of answer tokens alone; no tensor [tokens, V] exists at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd import backward

from mollm.chat import IGNORE_INDEX, Batch, Tokens
from mollm.methods import Answers, ForgetLoss, Totals, answers_of, unlearning_cross_entropy
from mollm.optimizer import MOLLMOptimizer
from mollm.references import Reference
from mollm_ops import linear_ce_kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OBJECTIVES = ("forget", "kl", "retain")


def accumulate(
    model: PreTrainedModel,
    reference: Reference,
    optimizer: MOLLMOptimizer,
    forget: Batch,
    retain: Batch,
    *,
    forget_loss: ForgetLoss = unlearning_cross_entropy,
    totals: tuple[Totals, Totals] | tuple[None, None] = (None, None),
) -> dict[str, Tensor]:
    """Adds the gradients of the three losses on one pair of batches to the optimizer's objectives.

    Args:
        model: The model to change.
        reference: The original.
        optimizer: Optimizer with the three OBJECTIVES.
        forget: Batch whose answer tokens are to become unlikely.
        retain: Batch whose answers are to stay as they are.
        forget_loss: What to minimise on the forget batch.
        totals: What the means divide by, on the forget and on the retain side, where these are
            micro-batches of a larger batch; then gradients and losses add up to those of the whole.

    Returns:
        The three losses before the step, detached.
    """
    with optimizer.objective("forget"):
        loss_forget = forget_side(model, reference, forget, forget_loss, totals[0])
        backward(loss_forget)
    loss_kl, loss_retain = retain_side(model, reference, retain, totals[1])
    with optimizer.objective("kl"):
        backward(loss_kl, retain_graph=True)
    with optimizer.objective("retain"):
        backward(loss_retain)
    losses = (loss_forget, loss_kl, loss_retain)
    return {name: loss.detach() for name, loss in zip(OBJECTIVES, losses, strict=True)}


def forget_side(
    model: PreTrainedModel,
    reference: Reference,
    batch: Batch,
    forget_loss: ForgetLoss,
    totals: Totals | None = None,
) -> Tensor:
    """The loss on what is to be forgotten."""
    return forget_loss(answers_of(model, batch, totals), lambda: reference.answers(batch))


def retain_side(
    model: PreTrainedModel, reference: Reference, batch: Batch, totals: Totals | None = None
) -> tuple[Tensor, Tensor]:
    """KL(original ‖ model) and cross-entropy on what is to stay, from one forward of the model."""
    # First, for to switch an adapter off touches the parameters that the other graph leads to.
    original: Answers = reference.answers(batch)
    answers = answers_of(model, batch, totals)
    loss_retain, loss_kl = linear_ce_kl(
        answers.hidden,
        answers.weight,
        answers.target,
        original.hidden,
        original.weight,
        bias=answers.bias,
        ref_bias=original.bias,
        normalizer=answers.tokens,
    )
    return loss_kl, loss_retain


def totals_of(rows: Sequence[Tokens]) -> Totals:
    """Answer tokens that carry a loss, and sequences."""
    counted = (label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    return Totals(sum(counted), len(rows))
