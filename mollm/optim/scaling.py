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
    `param_groups`. The first group has one more while it may come by, of a scalar that no model
    has, so that clipping does not reach it: what it was divided by is the scale.
    """

    def __init__(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        self._left = [(p, g, local(g)._version) for p in params if (g := p.grad) is not None]
        # float64 keeps it out of the lists that hold the shards of a DTensor
        self.scalar = nn.Parameter(torch.zeros((), dtype=torch.float64, device=params[0].device))
        self.scalar.grad = torch.full_like(self.scalar, _MARK)
        self._version = self.scalar.grad._version
        self._group, self._own = group, group["params"]
        self._found = _Visited([*self._own, self.scalar])
        group["params"] = self._found

    def end(self) -> None:
        """Takes the scalar out of the group again."""
        if self._group["params"] is self._found:
            self._group["params"] = self._own

    @property
    def unscaled(self) -> bool:
        """Whether a GradScaler may have divided the gradients. Torch does not count its division as
        a change, but does so if the scalar was clipped together with the gradients."""
        g = self.scalar.grad
        return self._found.visited and g is not None and g._version == self._version

    @property
    def scale(self) -> Tensor:
        """What they were divided by, a float64 scalar on their device; 1 without a GradScaler."""
        g = self.scalar.grad
        return torch.ones_like(self.scalar) if g is None else _MARK / g

    @property
    def touched(self) -> bool:
        """Whether they were changed otherwise."""
        return any(p.grad is not g or local(g)._version != v for p, g, v in self._left)

    def present(self) -> list[Tensor]:
        """The parameters that still have one."""
        return [p for p, _, _ in self._left if p.grad is not None]
