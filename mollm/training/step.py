"""The gradients of one training step: a forward and a backward pass for each objective.

    forget batch    one forward, one backward
    retain batch    one forward, shared by KL and cross-entropy; a backward for each

and the original model's final hidden states on the retain batch, see
`mollm.training.reference_model`. With several sets to forget or to retain there are such batches
of each; KL is the mean over all that is to be retained.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import backward

from mollm.data.chat import Batch
from mollm.distributed.processes import add_up_gradients
from mollm.methods import Totals
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.training.objectives import Objectives


def accumulate(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    forget: Batch,
    retain: Batch,
    *,
    totals: tuple[Totals, Totals] | None = None,
    last: bool = True,
) -> dict[str, Tensor]:
    """Adds the gradients of the three losses on one pair of batches to the optimizer's objectives.

    Args:
        objectives: The losses.
        optimizer: Optimizer with the three OBJECTIVES.
        forget: Batch whose answer tokens are to become unlikely.
        retain: Batch whose answers are to stay as they are.
        totals: What the means divide by, on the forget and on the retain side, where these are
            parts of a larger batch, of this process's and of others' micro-batches; then gradients
            and losses add up to those of the whole.
        last: Whether the step has no more micro-batches, so that the gradients of processes that
            hold copies of the model are added up now.

    Returns:
        The three losses before the step, detached.
    """
    of_forget, of_retain = totals or (None, None)
    return {
        **accumulate_forget(objectives, optimizer, forget, totals=of_forget, last=last),
        **accumulate_retain(objectives, optimizer, retain, totals=of_retain, last=last),
    }


def accumulate_forget(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    batch: Batch,
    *,
    name: str = "forget",
    totals: Totals | None = None,
    last: bool = True,
) -> dict[str, Tensor]:
    """Adds the gradient of the forget loss on a batch to the objective `name`; see `accumulate`."""
    loss = objectives(forget=batch, totals=totals and (totals, totals))["forget"]
    _descend(optimizer, name, loss, last=last)
    return {name: loss.detach()}


def accumulate_retain(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    batch: Batch,
    *,
    name: str = "retain",
    totals: Totals | None = None,
    share: float = 1.0,
    last: bool = True,
    last_of_kl: bool | None = None,
) -> dict[str, Tensor]:
    """Adds the gradients of KL and of the cross-entropy on a batch; see `accumulate`.

    Args:
        objectives: The losses.
        optimizer: Optimizer with an objective "kl".
        batch: What is to be retained.
        name: The objective of the cross-entropy.
        totals: As for `accumulate`.
        share: Of the answer tokens of all sets to retain, those of this set.
        last: Whether the step has no more batches of this set.
        last_of_kl: Whether it has no more of any set to retain; default as `last`.
    """
    losses = objectives(retain=batch, totals=totals and (totals, totals))
    kl = losses["kl"] * share
    every = last if last_of_kl is None else last_of_kl
    _descend(optimizer, "kl", kl, last=every, retain_graph=True)
    _descend(optimizer, name, losses["retain"], last=last)
    return {"kl": kl.detach(), name: losses["retain"].detach()}


def _descend(
    optimizer: MOLLMOptimizer, name: str, loss: Tensor, *, last: bool, retain_graph: bool = False
) -> None:
    with optimizer.objective(name):
        backward(loss, retain_graph=retain_graph)
        if last:
            add_up_gradients([p for group in optimizer.param_groups for p in group["params"]])
