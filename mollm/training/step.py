"""One training step: two forward passes of the model, three backward passes, three gradients.

    forget batch    one forward, one backward
    retain batch    one forward, shared by KL and cross-entropy; a backward for each

and the original model's final hidden states on the retain batch, see
`mollm.training.reference_model`.

If the optimizer streams gradients, these backwards end at the last block, and its `step()` resumes
there, see `MOLLMOptimizer.streamed`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.autograd import backward

from mollm.data.chat import Batch
from mollm.distributed.processes import add_up_gradients
from mollm.methods import Totals
from mollm.methods.method import OBJECTIVES
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
    if optimizer.streams:
        with optimizer.streamed(blocks, add_up=True):
            losses = _taken(objectives(forget=forget, totals=totals), optimizer)
            return losses | _taken(objectives(retain=retain, totals=totals), optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def descend(name: str, loss: Tensor, retain_graph: bool = False) -> None:
        with optimizer.objective(name):
            backward(loss, retain_graph=retain_graph)
            if last:
                add_up_gradients(params)

    losses = objectives(forget=forget, totals=totals)
    descend("forget", losses["forget"])
    losses |= objectives(retain=retain, totals=totals)
    descend("kl", losses["kl"], retain_graph=True)
    descend("retain", losses["retain"])
    return {name: losses[name].detach() for name in OBJECTIVES}


def _taken(losses: dict[str, Tensor], optimizer: MOLLMOptimizer) -> dict[str, Tensor]:
    """The losses without their graphs, which lead to the last block alone and are used up."""
    optimizer.backward(losses)
    return {name: loss.detach() for name, loss in losses.items()}
