"""The gradients of one training step: a forward and a backward pass for each objective.

    forget batch    one forward, one backward
    retain batch    one forward, shared by KL and cross-entropy; a backward for each

and the original model's final hidden states on the retain batch, see
`mollm.training.reference_model`. With several sets to forget or to retain there are such batches
of each; KL is the mean over all that is to be retained.

If the optimizer streams gradients, these backwards end at the last block, and its `step()` resumes
there, see `MOLLMOptimizer.streamed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.autograd import backward

from mollm.data.chat import Batch
from mollm.distributed.processes import add_up_gradients
from mollm.methods import LossDenominators
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.training.objectives import Objectives


def accumulate(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    forget: Batch,
    retain: Batch,
    *,
    totals: tuple[LossDenominators, LossDenominators] | None = None,
    last: bool = True,
    blocks: Sequence[nn.Module] = (),
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
        blocks: Those of the model, for an optimizer that streams gradients, see
            `mollm.find_blocks`.

    Returns:
        The three losses before the step, detached.
    """
    of_forget, of_retain = totals or (None, None)
    return {
        **accumulate_forget(
            objectives, optimizer, forget, totals=of_forget, last=last, blocks=blocks
        ),
        **accumulate_retain(
            objectives, optimizer, retain, totals=of_retain, last=last, blocks=blocks
        ),
    }


def accumulate_forget(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    batch: Batch,
    *,
    name: str = "forget",
    totals: LossDenominators | None = None,
    last: bool = True,
    blocks: Sequence[nn.Module] = (),
) -> dict[str, Tensor]:
    """Adds the gradient of the forget loss on a batch to the objective `name`; see `accumulate`."""
    with _recording(optimizer, blocks):
        losses = {name: objectives(forget=batch, totals=totals and (totals, totals))["forget"]}
        return _descend(optimizer, losses, {name: last})


def accumulate_retain(
    objectives: Objectives,
    optimizer: MOLLMOptimizer,
    batch: Batch,
    *,
    name: str = "retain",
    totals: LossDenominators | None = None,
    share: float = 1.0,
    last: bool = True,
    last_of_kl: bool | None = None,
    blocks: Sequence[nn.Module] = (),
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
        blocks: As for `accumulate`.
    """
    with _recording(optimizer, blocks):
        found = objectives(retain=batch, totals=totals and (totals, totals))
        losses = {"kl": found["kl"] * share, name: found["retain"]}
        every = last if last_of_kl is None else last_of_kl
        return _descend(optimizer, losses, {"kl": every, name: last})


def _recording(
    optimizer: MOLLMOptimizer, blocks: Sequence[nn.Module]
) -> AbstractContextManager[None]:
    return optimizer.streamed(blocks, add_up=True) if optimizer.streams else nullcontext()


def _descend(
    optimizer: MOLLMOptimizer, losses: dict[str, Tensor], last: Mapping[str, bool]
) -> dict[str, Tensor]:
    """The losses without their graphs, which are used up."""
    if optimizer.streams:
        optimizer.backward(losses)
        return {name: loss.detach() for name, loss in losses.items()}
    for name, loss in losses.items():
        with optimizer.objective(name):
            backward(loss, retain_graph=name != list(losses)[-1])
            if last[name]:
                add_up_gradients([p for group in optimizer.param_groups for p in group["params"]])
    return {name: loss.detach() for name, loss in losses.items()}
