"""What the kernels are told, each as one immutable value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mollm_ops._checks import GradientLists


@dataclass(frozen=True)
class RunningMeans:
    """Running means of the gradients, which take their place in Gram matrix and update.

        m_k ← β m_k + (1 − β) g_k

    `gram_moved` multiplies what `update_` will store, and leaves them as they are: a Gram matrix
    that is not finite costs nothing.
    """

    means: GradientLists
    """K lists of N contiguous tensors, with one wherever there is a gradient."""
    beta: float


@dataclass(frozen=True)
class AdamMetric:
    """The diagonal metric of Adam, from the second moment of all objectives together.

        v' = β₂ v + (1 − β₂) Σ_k c_k g_k²,   P = 1 / (√(v' / (1 − β₂^t)) + ε)

    It does not depend on the weights that the Gram matrix leads to, so that a step −lr · P d with
    the same v' has g_k · step = −lr (G^P w)_k exactly.
    """

    exp_avg_sqs: Sequence[Tensor | None]
    """v of the N parameters, left as it is; None for zeros."""
    steps: Sequence[Tensor]
    """t − 1 of the N parameters as scalars: the steps done so far."""
    weights: Tensor
    """c_k ≥ 0, [K]."""
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class Targets:
    """What a step reads and writes for each of N parameters."""

    params: Sequence[Tensor]
    first: Sequence[Tensor] | None
    """Momentum buffers (SGD) or first moments (AdamW); None for a method that keeps none."""
    second: Sequence[Tensor] | None
    """Second moments (AdamW)."""
    steps: Sequence[Tensor]
    """t as a float32 scalar for each parameter, this step included."""


@dataclass(frozen=True)
class SgdStep:
    """Stochastic gradient descent with decoupled weight decay.

    b ← μ b + d;   d ← d + μ b  (Nesterov)  or  b;   θ ← (1 − lr λ) θ − lr d
    """

    lr: float | Tensor
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamWStep:
    """AdamW.

        m ← β₁ m + (1 − β₁) d;   v ← β₂ v + (1 − β₂) d²
        θ ← (1 − lr λ) θ − lr (m / (1 − β₁^t)) / (√(v / (1 − β₂^t)) + ε)

    Without first moments β₁ counts as 0. Where `second_weights` c is given, v takes Σ_k c_k g_k² in
    place of d².

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    second_weights: Tensor | None = None


@dataclass(frozen=True)
class LogitTransform:
    """From the outputs z₀ of a head to logits: z = c tanh(s z₀ / c), or s z₀ without a cap.

    Called with outputs it gives their logits, in the outputs' dtype and with a graph.

    Raises:
        ValueError: A scale that is not a positive number, or a cap that is not.
    """

    scale: float = 1.0
    """s > 0."""
    softcap: float | None = None
    """c > 0; None, or infinity, for none."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"logit_scale must be a positive number, but got {self.scale}.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be a positive number or None, but got {self.softcap}.")
        if self.softcap == math.inf:
            object.__setattr__(self, "softcap", None)

    def __call__(self, outputs: Tensor) -> Tensor:
        scaled = outputs if self.scale == 1 else self.scale * outputs
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


IDENTITY = LogitTransform()
"""Of a model whose logits are what its head returns."""


@dataclass(frozen=True)
class RowLoss:
    """Where one loss of a block of rows goes."""

    losses: Tensor
    """[R] wide, contiguous: the loss of every row, not scaled."""
    scale: Tensor
    """[R] wide, any stride: what the gradient of every row is multiplied by."""
    gradient: Tensor | None
    """[R, V], rows contiguous: scale · ∂L/∂z₀. May be the logits or the reference's logits."""
