"""What some methods change beside the step: their weights from step to step, and the model at the
end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mollm.distributed.sharding import local
from mollm.methods import Seen
from mollm.models.adapters import is_first_factor
from mollm.training.history import StepRecord, skipped_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from mollm.optim.optimizer import MOLLMOptimizer
    from mollm.training.config import MOLLMConfig


class Adaptation:
    """`Method.adapt` and `Method.finish` of one run, which begins when this is made.

    Args:
        args: Of the run.
        objectives: Their names.
        optimizer: Gets the weights of the next step as its preferences.
        model: What trains of it starts as `original` has it, whatever was made of it before.
        original: What `trained_of` kept of the model, for a method that finishes.
    """

    def __init__(
        self,
        args: MOLLMConfig,
        objectives: Sequence[str],
        optimizer: MOLLMOptimizer,
        model: nn.Module,
        original: Mapping[str, Tensor],
    ) -> None:
        method, chosen = args.chosen_method, args.chosen_options
        self._adapt: Any = method.adapt and method.bound(method.adapt, chosen)
        self._finish: Any = method.finish and method.bound(method.finish, chosen)
        self._optimizer = optimizer
        self._model = model
        preferences = args.for_optimizer(objectives)["preferences"]
        self._first = dict(zip(objectives, preferences or (), strict=bool(preferences)))
        self._weights = self._first
        self._applied = 0
        self._original = original
        for _, part, before in self._trained():
            part.copy_(before)
        self._set(None)

    def after(self, record: StepRecord, epoch: float) -> None:
        """Sets the weights of the next step from those of this one and what it found.

        Args:
            record: Of the step.
            epoch: Passes over the set to forget when it began.
        """
        self._applied += not skipped_in([record])
        self._set(Seen(record.losses, epoch, self._applied))

    def _set(self, seen: Seen | None) -> None:
        if self._adapt:
            self._weights = self._adapt(self._weights, self._first, seen)
            self._optimizer.set_preferences([*self._weights.values()])

    @torch.no_grad()
    def finish(self) -> None:
        """Makes of the model what the method makes of it once the last step is made."""
        for name, part, before in self._trained():
            if not is_first_factor(name):  # of an adapter's product B A, B alone is turned around
                part.copy_(self._finish(part, before))

    def _trained(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, p in self._model.named_parameters():
            if name in self._original:
                part = local(p).detach()
                yield name, part, self._original[name].to(part)


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy on the host of all that trains, of parts this process's own."""
    return {
        name: local(p).detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
