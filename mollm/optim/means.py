"""Running means of each objective's gradient: momentum per objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mollm.distributed.sharding import Lists, local
from mollm.errors import UsageError
from mollm.models.slices import same_rows, whole_of
from mollm.optim.saved_state import check_entry, check_number
from mollm_ops.operands import RunningMeans


class ObjectiveMeans:
    """m_k ← β m_k + (1 − β) g_k for every objective k, and the number of steps behind them.

    A parameter's mean has the dtype of its first gradient and is sharded as the parameter is. The
    means change in place, in the same pass as the parameters.
    """

    def __init__(self, beta: float) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"mean_beta must be in [0, 1), but got {beta}.")
        self.beta = beta
        self._steps = torch.zeros((), dtype=torch.float64)
        self._held: dict[str, dict[Tensor, Tensor]] = {}

    def moving(
        self, objectives: Sequence[str], params: Sequence[Tensor], lists: Lists
    ) -> RunningMeans:
        """This process's part of the means of these parameters. Where one meets no gradient, a
        gradient of zeros is put into `lists`, so that it decays."""
        rows: list[list[Tensor | None]] = []
        for name, tensors in zip(objectives, lists, strict=True):
            held = self._held.setdefault(name, {})
            row: list[Tensor | None] = []
            for n, p in enumerate(params):
                g, whole = tensors[n], whole_of(p)
                if g is not None and whole not in held:
                    held[whole] = torch.zeros_like(
                        whole.detach(), dtype=g.dtype, memory_format=torch.contiguous_format
                    )
                mean = same_rows(local(held[whole]), p) if whole in held else None
                if g is None and mean is not None:
                    tensors[n] = torch.zeros_like(mean)
                row.append(mean)
            rows.append(row)
        return RunningMeans(rows, self.beta)

    def correction(self, device: torch.device) -> Tensor:
        """1 − β^t at the coming step t: what a mean must be divided by."""
        self._steps = self._steps.to(device)
        result: Tensor = 1 - self.beta ** (self._steps + 1)
        return result

    def count(self, proceed: Tensor | None) -> None:
        """One more step, if it was taken; in place, so that a CUDA graph's replays count too."""
        self._steps.add_(1 if proceed is None else proceed)

    def state_dict(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """The means by objective and number of the parameter."""
        at = {p: n for n, p in enumerate(params)}
        held = {name: {at[p]: m for p, m in means.items()} for name, means in self._held.items()}
        return {"steps": float(self._steps), "held": held}

    def check_state(
        self, state: dict[str, Any] | None, objectives: Sequence[str], params: Sequence[Tensor]
    ) -> None:
        """Refuses a state that is not of these objectives and parameters.

        Raises:
            UsageError: it says which entry is wrong.
        """
        if not state:
            return
        if not {"steps", "held"} <= set(state) or not isinstance(state["held"], Mapping):
            raise UsageError(
                f"the means in the state to load must have steps and held, but have "
                f"{', '.join(map(str, state)) or 'nothing'}: load a state of this optimizer."
            )
        check_number("the number of steps behind the means", state["steps"])
        for name, means in state["held"].items():
            if not isinstance(means, Mapping) or not all(str(n).isdecimal() for n in means):
                raise UsageError(
                    f"the means of objective {name!r} in the state to load must be tensors by the "
                    "number of their parameter, but they are not: load an earlier checkpoint."
                )
            if name not in objectives:
                raise UsageError(
                    f"the state holds means of objective {name!r}, but the optimizer's objectives "
                    f"are {', '.join(objectives)}: load it into one that has the same."
                )
            for n, mean in means.items():
                if not 0 <= int(n) < len(params):
                    raise UsageError(
                        f"the state holds a mean of parameter {n}, but the optimizer has "
                        f"{len(params)} parameters: load it into one of the same model."
                    )
                check_entry(f"the mean of objective {name!r}", mean, int(n), params[int(n)])

    def load_state_dict(self, state: dict[str, Any] | None, params: Sequence[Tensor]) -> None:
        """Takes the means over; without a state they start anew."""
        state = state or {"steps": 0.0, "held": {}}
        self._steps = torch.tensor(state["steps"], dtype=torch.float64)
        self._held = {
            name: {params[int(n)]: m.to(params[int(n)].device, copy=True) for n, m in means.items()}
            for name, means in state["held"].items()
        }


def next_means(moving: RunningMeans, lists: Lists, weights: Tensor) -> tuple[Lists, Tensor]:
    """Σ_k w_k (β m_k + (1 − β) g_k) as 2 K lists and their weights, for `mollm_ops.combine`."""
    both = torch.cat([weights * moving.beta, weights * (1 - moving.beta)])
    return [*(list(means) for means in moving.means), *lists], both


def moved(moving: RunningMeans, lists: Lists, proceed: Tensor | None = None) -> Lists:
    """Moves the means on by themselves, without a fused step and unless `proceed` is 0, and
    returns them."""
    for means, tensors in zip(moving.means, lists, strict=True):
        for mean, g in zip(means, tensors, strict=True):
            if mean is not None and g is not None:
                new = mean.lerp(g.to(mean.dtype), 1 - moving.beta)
                mean.copy_(new if proceed is None else torch.where(proceed, new, mean))
    return [list(means) for means in moving.means]
