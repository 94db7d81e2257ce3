"""What happens to `p.grad` between `aggregate()` and `step()`: a GradScaler, or clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mollm.distributed.sharding import local

_MARK = 2.0**-100  # exact under a scale that is a power of two, and nothing to a norm


class _Visited(list[Tensor]):
    """A list that knows whether anybody went through it; the host need not wait to know."""

    visited = False

    def __iter__(self) -> Iterator[Tensor]:
        self.visited = True
        return super().__iter__()


class Watched:
    """The gradients that aggregate() left, and what has happened to them since.

    A GradScaler tells no optimizer its scale, but divides every gradient that it finds in
    `param_groups`. There is one more while it may come by, of a scalar that no model has, so that
    clipping does not reach it: what it was divided by is the scale.
    """

    def __init__(self, params: Sequence[Tensor], defaults: dict[str, Any]) -> None:
        self._left = [(p, g, local(g)._version) for p in params if (g := p.grad) is not None]
        # float64 keeps it out of the lists that hold the shards of a DTensor
        self._scalar = nn.Parameter(torch.zeros((), dtype=torch.float64, device=params[0].device))
        self._scalar.grad = torch.full_like(self._scalar, _MARK)
        self._found = _Visited([self._scalar])
        self.group: dict[str, Any] = {**defaults, "params": self._found}

    @property
    def unscaled(self) -> bool:
        """Whether a GradScaler may have divided the gradients."""
        return self._found.visited

    @property
    def scale(self) -> Tensor:
        """What they were divided by, a float64 scalar on their device; 1 without a GradScaler."""
        g = self._scalar.grad
        return torch.ones_like(self._scalar) if g is None else _MARK / g

    @property
    def touched(self) -> bool:
        """Whether they were changed otherwise: Torch does not count a GradScaler's division."""
        return any(p.grad is not g or local(g)._version != v for p, g, v in self._left)

    def present(self) -> list[Tensor]:
        """The parameters that still have one."""
        return [p for p, _, _ in self._left if p.grad is not None]
