"""The bases "adamw" and "sgd": Torch optimizers whose step reads K gradients and their weights.

Their `param_groups` and `state` have the names of Torch's own AdamW and SGD, so that schedulers,
checkpoints and tools find what they expect.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mollm.distributed.sharding import common_seed, local, sharding_of
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.update import update_

_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class FusedBase(Optimizer, ABC):
    """What AdamW and SGD share: state made on first use, and a step along Σ_k w_k g_k.

    Args of both:
        state_dtype: torch.float32 or torch.bfloat16 for the state; default that of the parameter.
        stochastic_rounding: round bfloat16 results up or down at random, so that their mean is
            exact; see `mollm_ops.update.update_`.
    """

    first_name: ClassVar[str]
    _keep_first = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        lr, decay, dtype = (defaults[k] for k in ("lr", "weight_decay", "state_dtype"))
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: lr must not be negative, but got {lr}.")
        if not decay >= 0:
            raise ValueError(f"weight_decay must not be negative, but got {decay}.")
        if dtype not in _STATE_DTYPES:
            raise ValueError(
                f"state_dtype must be torch.float32, torch.bfloat16 or None, but got {dtype}."
            )
        # "fused" makes Torch keep `step` on the parameter's device when a state is loaded.
        seed = common_seed() if defaults["stochastic_rounding"] else torch.initial_seed()
        super().__init__(params, {**defaults, "fused": True, "rounding_seed": seed})

    def drop_first(self) -> None:
        """Keep no momentum of the combined gradient: the caller has its own."""
        self._keep_first = False

    @abstractmethod
    def _slots(self, group: dict[str, Any]) -> list[str]:
        """The names of the state that a parameter of this group keeps, beside `step`."""

    @abstractmethod
    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> SgdStep | AdamWStep:
        """The group's options as the kernels take them."""

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self._slots(group):
            if state.get(name) is None:
                state[name] = torch.zeros_like(p, dtype=group["state_dtype"] or p.dtype)
        return state

    def make_state(self) -> None:
        """The state of every parameter, where there is none yet."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p, group)

    def metric(self, params: Sequence[Tensor], weights: Tensor) -> AdamMetric:
        """Adam's metric at the coming step; for bases that keep a second moment."""
        group = self.param_groups[0]
        states = [self._state_of(p, group) for p in params]
        return AdamMetric(
            [local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            weights,
            group["betas"][1],
            group["eps"],
        )

    @torch.no_grad()
    def step_along(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor | None]],
        weights: Tensor,
        *,
        moving: RunningMeans | None = None,
        second_weights: Tensor | None = None,
        proceed: Tensor | None = None,
        track: bool = False,
    ) -> Tensor | None:
        """One step of every group along d = Σ_k w_k g_k.

        Args:
            params: the N parameters that have a gradient, all sharded alike.
            gradients: K lists of N tensors or None; of sharded ones, this process's part.
            weights: w, [K].
            moving, second_weights, proceed, track: see `mollm_ops.update.update_` and `AdamWStep`.

        Returns:
            g_k · Δθ over all parameters' parts on this process, [K], or None without `track`.
        """
        changes: Tensor | None = None
        at = {p: n for n, p in enumerate(params)}
        for number, group in enumerate(self.param_groups):
            mine = [p for p in group["params"] if p in at]
            if not mine:
                continue
            columns = [at[p] for p in mine]
            columns_of = {p: n for n, p in enumerate(group["params"])}
            states = [self._state_of(p, group) for p in mine]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0 if proceed is None else proceed.float())
            first, second = (
                [local(state[name]) for state in states] if name in self._slots(group) else None
                for name in (self.first_name, "exp_avg_sq")
            )
            seed = None
            if group["stochastic_rounding"]:  # another one for every group, bucket and shard
                place = (sharding_of(mine[0]).part << 48) + (number << 32) + columns_of[mine[0]]
                seed = (group["rounding_seed"] + place) % (1 << 63)
            part = update_(
                [[tensors[n] for n in columns] for tensors in gradients],
                weights,
                Targets([local(p) for p in mine], first, second, steps),
                self._method(group, second_weights),
                moving=moving and _columns(moving, columns),
                rounding_seed=seed,
                proceed=proceed,
                track=track,
            )
            if part is not None:
                changes = part if changes is None else changes + part
        return changes

    def restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undoes the cast to the parameters' dtype with which Torch loads a state."""
        saved = state_dict["state"]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    self.state[p][name] = value.detach().to(p.device, copy=True)


def _columns(moving: RunningMeans, columns: Sequence[int]) -> RunningMeans:
    return RunningMeans([[row[n] for n in columns] for row in moving.means], moving.beta)


class AdamW(FusedBase):
    """AdamW, see `mollm_ops.update.AdamWStep`; options as `torch.optim.AdamW` where it has them."""

    first_name = "exp_avg"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), but got {betas}.")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, but got {eps}.")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def _slots(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq"] if self._keep_first else ["exp_avg_sq"]

    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> AdamWStep:
        return AdamWStep(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            second_weights=second_weights,
        )


class SGD(FusedBase):
    """SGD, see `mollm_ops.update.SgdStep`. Unlike Torch's, its weight decay is decoupled."""

    first_name = "momentum_buffer"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), but got {momentum}.")
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, but got 0.")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
            },
        )

    def _slots(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer"] if self._keep_first and group["momentum"] else []

    def _method(self, group: dict[str, Any], second_weights: Tensor | None) -> SgdStep:
        return SgdStep(
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )
