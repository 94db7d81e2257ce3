"""DualOptimPlus: AdamW whose moments are a shared part and a part for each of two kinds of steps.

With g the gradient of the step, k its kind, m, v shared by all steps and Δm_k, Δv_k of this kind:

    m̂ = m / (1 − γ₁^(t−1)),   v̂ = v / (1 − γ₂^(t−1)),   0 before the first step
    Δm_k ← β₁ Δm_k + (1 − β₁)(g − m̂)
    Δv_k ← β₂ Δv_k + (1 − β₂)(g² − v̂)
    θ ← (1 − η λ) θ − η (Δm_k / (1 − β₁^t_k) + m̂) / (√|Δv_k / (1 − β₂^t_k) + v̂| + ε)
    m ← γ₁ m + (1 − γ₁) g,   v ← γ₂ v + (1 − γ₂) g²

t counts all steps and t_k those of the kind; η is `forget_lr_ratio` times the learning rate in
steps of the first kind.

Source: Zhong et al., arXiv 2605.21539, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mollm.distributed.sharding import local, local_gradient

_KINDS = ("forget", "retain")


class DualOptimPlus(Optimizer):
    """Steps of two kinds in turns: `forget_steps` of the first, then `retain_steps` of the second.

    Args:
        params: as for any Torch optimizer.
        lr: learning rate of the second kind.
        forget_steps: of a turn.
        retain_steps: of a turn.
        forget_lr_ratio: learning rate of the first kind by that of the second.
        betas: β₁, β₂ of the parts that each kind has.
        base_betas: γ₁, γ₂ of the shared part.
        eps: ε.
        weight_decay: λ.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DualOptimPlus([x], lr=0.1)
        >>> x.grad = torch.tensor([3.0])
        >>> optimizer.step()
        >>> round(x.item(), 4)  # the first step is as long as that of Adam
        0.9
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        *,
        forget_steps: int = 1,
        retain_steps: int = 5,
        forget_lr_ratio: float = 1.0,
        betas: Sequence[float] = (0.9, 0.95),
        base_betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, pair in (("betas", betas), ("base_betas", base_betas)):
            if len(pair) != 2 or not all(0 <= float(beta) < 1 for beta in pair):
                raise ValueError(f"{name} must be two numbers from 0 to below 1, but got {pair}.")
        if forget_steps < 1 or retain_steps < 1:
            raise ValueError(
                "forget_steps and retain_steps must be at least 1, but got "
                f"{forget_steps} and {retain_steps}."
            )
        defaults = {
            "lr": lr,
            "forget_steps": forget_steps,
            "retain_steps": retain_steps,
            "forget_lr_ratio": forget_lr_ratio,
            "betas": tuple(map(float, betas)),
            "base_betas": tuple(map(float, base_betas)),
            "eps": eps,
            "weight_decay": weight_decay,
            "applied": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along `p.grad`, of the kind whose turn it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            place = group["applied"] % (group["forget_steps"] + group["retain_steps"])
            kind = _KINDS[place >= group["forget_steps"]]
            for p in group["params"]:
                gradient = local_gradient(p)
                if gradient is not None:
                    _step(local(p), gradient, self._state_of(p), group, kind)
            group["applied"] += 1
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["steps"] = 0
            for name in ("shared", *_KINDS):
                state[f"{name}_mean"] = torch.zeros_like(p)
                state[f"{name}_square"] = torch.zeros_like(p)
            state |= {f"{kind}_steps": 0 for kind in _KINDS}
        return state


def _step(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], kind: str) -> None:
    (beta1, beta2), (gamma1, gamma2) = group["betas"], group["base_betas"]
    before = state["steps"]
    state["steps"] += 1
    state[f"{kind}_steps"] += 1
    turn = state[f"{kind}_steps"]
    m, v = local(state["shared_mean"]), local(state["shared_square"])
    dm, dv = local(state[f"{kind}_mean"]), local(state[f"{kind}_square"])
    shared_m = m / (1 - gamma1**before) if before else m
    shared_v = v / (1 - gamma2**before) if before else v
    lr = group["lr"] * (group["forget_lr_ratio"] if kind == _KINDS[0] else 1.0)
    p.mul_(1 - lr * group["weight_decay"])
    dm.lerp_(g - shared_m, 1 - beta1)
    dv.lerp_(g.square() - shared_v, 1 - beta2)
    mean = dm / (1 - beta1**turn) + shared_m
    square = dv / (1 - beta2**turn) + shared_v
    p.sub_(lr * mean / (square.abs().sqrt() + group["eps"]))
    m.lerp_(g, 1 - gamma1)
    v.lerp_(g.square(), 1 - gamma2)
