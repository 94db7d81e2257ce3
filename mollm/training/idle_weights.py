"""Weights that a run trains in name alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mollm.distributed import processes
from mollm.optim.bases import FusedBase

if TYPE_CHECKING:
    from torch import nn

    from mollm.optim.optimizer import MOLLMOptimizer

_NAMED = 3


def note_on_idle_weights(model: nn.Module, optimizer: MOLLMOptimizer) -> str | None:
    """What to say of weights that never had a gradient of any objective; None if all had one, or
    where the base is not ours, which may keep nothing of a weight that it has changed.

    Args:
        model: Has them.
        optimizer: Has made a step.
    """
    if not isinstance(optimizer.base, FusedBase):
        return None
    trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    names = {name: trained[id(p)] for name, p in model.named_parameters() if id(p) in trained}
    mine = {name for name, p in names.items() if not optimizer.state.get(p)}
    idle = set.intersection(*processes.all_gather(mine))
    if not idle:
        return None
    first = [name for name in names if name in idle][:_NAMED]
    more = f" and {len(idle) - len(first)} more" if len(idle) > len(first) else ""
    return (
        f"of {len(names)} trained tensors, {len(idle)} never had a gradient and did not change: "
        f"{', '.join(first)}{more}; the model does not use them here, so leave them out of what "
        "trains."
    )
