"""What the kernels are told, each as one immutable value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mollm_ops._checks import GradientLists


def largest_moment(dtype: torch.dtype) -> float:
    """The largest number that a state of that dtype may be given: its maximum, less what kernels
    that round in another order may differ by. As csrc/gram.h, largest_moment."""
    return torch.finfo(dtype).max * (1 - 2.0**-20)


@dataclass(frozen=True)
class RunningMeans:
    """Running means of the gradients, which take their place in Gram matrix and update.

        m_k ← β m_k + (1 − β) g_k

    `gram_moved` multiplies what `update_` will store, and leaves them as they are: a Gram matrix
    that is not finite costs nothing.

    Example:
        >>> import torch
        >>> RunningMeans(means=[[torch.zeros(3)], [torch.zeros(3)]], beta=0.9).beta  # K = 2, N = 1
        0.9
    """

    means: GradientLists
    """K lists of N contiguous tensors, with one wherever there is a gradient."""
    beta: float


@dataclass(frozen=True)
class AdamMetric:
    """The diagonal metric of Adam, from the second moment of all objectives together.

        v' = β₂ v + (1 − β₂) Σ_k c_k g_k²,   P = 1 / (√(v' / (1 − β₂^t)) + ε)

    It does not depend on the weights that the Gram matrix leads to, so that a step −lr · P d with
    the same v' has g_k · step = −lr (G^P w)_k exactly. v is read as it is stored, and v' is used
    before it is rounded to the dtype of v, here as in the step.

    Where the dtype of v cannot hold v', or the sum overflows, P is NaN, and so is the Gram matrix.
    Parameters of other β₂ or ε have a metric, and a Gram matrix, of their own: these add up.

    Example:
        >>> import torch
        >>> from mollm_ops import gram_moved
        >>> g = [[torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]]
        >>> first = AdamMetric([None], [torch.zeros(())], weights=torch.tensor([1.0, 1.0]))
        >>> [[round(x, 4) for x in row] for row in gram_moved(g, metric=first).tolist()]
        [[1.7889, -0.8944], [-0.8944, 1.4472]]
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
    """What a step reads and writes for each of N parameters.

    Example:
        >>> import torch
        >>> p = torch.zeros(3)
        >>> targets = Targets([p], first=None, second=[torch.zeros(3)], steps=[torch.tensor(1.0)])
    """

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

    Example:
        >>> SgdStep(lr=0.1, momentum=0.9, nesterov=True).weight_decay
        0.0
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

    Example:
        >>> AdamWStep(lr=1e-5).beta2
        0.999
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
    """c > 0; None, or more than 1e30, for none."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"logit_scale must be a positive number, but got {self.scale}.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be a positive number or None, but got {self.softcap}.")
        if not 1e-30 <= self.scale <= 1e30:  # kernels multiply and divide by it in float32
            raise ValueError(f"logit_scale must be in [1e-30, 1e30], but got {self.scale}.")
        if self.softcap is not None and self.softcap > 1e30:
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
