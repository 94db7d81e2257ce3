"""From the Gram matrix of K gradients to the weights of a common descent direction."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from mollm_ops import _cuda
from mollm_ops._checks import check_tensor, refuse_transforms
from mollm_ops._extension import MAX_OBJECTIVES, extension, has_kernels_for
from mollm_ops.reference import dual_space as dual_space_reference

RULES = ("dual", "mgda", "project", "upgrad")  # the order of csrc/gram.h, SolveRequest
LENGTHS = ("mean", "min-norm", "first")  # the order of csrc/dual_space.h, enum Length


class Status(IntEnum):
    """How a Solution came about."""

    DUAL = 0
    """The centre of the dual cone."""
    MIN_NORM = 1
    """The min-norm point of the gradients' convex hull."""
    STATIONARY = 2
    """No direction descends on every objective; the weights are zero."""
    NON_FINITE = 3
    """The Gram matrix holds an infinity or a NaN; the weights are zero."""
    SOLVED = 4
    """Another rule's weights."""


def active_objectives(gram: Tensor) -> Tensor:
    """[K] bool: the objectives whose gradient is not zero or negligible beside the largest."""
    square = gram.diagonal()
    return (square > 0) & (square >= dual_space_reference.NEGLIGIBLE * square.max())


class Solution:
    """Weights for Σ_k w_k g_k; the direction of descent is its negative.

    `weights` is float64 [K] on the Gram matrix's device. Reading `status` or `pareto_gap` waits
    for that device; holding a Solution does not.

    Example:
        >>> import torch
        >>> dual_space_weights(torch.eye(2))
        Solution(weights=[0.5, 0.5], status=DUAL, pareto_gap=0.707107)
    """

    def __init__(self, packed: Tensor) -> None:
        self._packed = packed.detach()  # [K weights, status, Pareto gap]

    @property
    def weights(self) -> Tensor:
        return self._packed[:-2]

    @property
    def finite(self) -> Tensor:
        """Whether the Gram matrix was finite, as a scalar on its device."""
        return self._packed[-2] != int(Status.NON_FINITE)

    def refused_unless(self, fine: Tensor) -> Solution:
        """The same where `fine`, a scalar on the same device, holds; NON_FINITE elsewhere."""
        refused = torch.zeros_like(self._packed)
        refused[-2:] = self._packed[-2:]
        refused[-2].fill_(int(Status.NON_FINITE))
        return Solution(torch.where(fine, self._packed, refused))

    @property
    def status(self) -> Status:
        return Status(int(self._packed[-2]))

    @property
    def pareto_gap(self) -> float:
        """Norm of the min-norm point of the unit gradients, in [0, 1]; 0 is Pareto stationary."""
        return float(self._packed[-1])

    def with_weights(self, weights: Tensor) -> Solution:
        """The same verdict on other weights, [K]; zeros where the Gram matrix was not finite."""
        kept = torch.where(self.finite, weights.to(self._packed), 0.0)
        return Solution(torch.cat([kept, self._packed[-2:]]))

    def __repr__(self) -> str:
        return (
            f"Solution(weights={self.weights.tolist()}, status={self.status.name}, "
            f"pareto_gap={self.pareto_gap:.6g})"
        )


def _on_device(gram: Tensor) -> bool:
    """Whether the weights are worked out where the matrix is."""
    return gram.is_cuda and len(gram) <= MAX_OBJECTIVES and has_kernels_for(gram.device)


@torch.library.custom_op("mollm::solve", mutates_args=())
def _solve(
    gram: Tensor, rule: str, preferences: Sequence[float], normalize: bool, length: str
) -> Tensor:
    _check(gram, rule, preferences, length)
    if _on_device(gram):
        tau = LENGTHS.index(length)
        return _cuda.solve(gram, RULES.index(rule), preferences, normalize, tau)
    G = gram.detach().resolve_neg().cpu().numpy()
    if extension is None or len(G) > MAX_OBJECTIVES:
        verdict = dual_space_reference.solve(
            G,
            rule,
            dual_space_reference.as_array(preferences),
            normalize=normalize,
            length=length,
        )
        weights, status, gap = verdict.weights, verdict.status, verdict.pareto_gap
    else:
        tau = LENGTHS.index(length)
        if rule == "dual":
            weights, status, gap = extension.dual_space_solution(G, tau)
        elif rule == "mgda":
            weights, status, gap = extension.min_norm_solution(G, normalize, tau)
        else:
            weights, status, gap = extension.projected_solution(
                G, list(preferences), rule == "upgrad", normalize, tau
            )
    return torch.tensor([*weights, status, gap], dtype=torch.float64, device=gram.device)


@_solve.register_fake
def _(
    gram: Tensor, rule: str, preferences: Sequence[float], normalize: bool, length: str
) -> Tensor:
    _check(gram, rule, preferences, length)
    return gram.new_empty(gram.shape[0] + 2)


def _check(gram: Tensor, rule: str, preferences: Sequence[float], length: str) -> None:
    K = _objectives(gram)
    if gram.dtype != torch.float64:
        raise TypeError(f"gram must be float64, but got {gram.dtype}.")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, but got {rule!r}.")
    if length not in LENGTHS:
        raise ValueError(f"length must be one of {', '.join(LENGTHS)}, but got {length!r}.")
    if len(preferences) != K:
        raise ValueError(
            f"preferences must have one entry per objective ({K}), but got {len(preferences)}."
        )
    if not all(0 <= p < float("inf") for p in preferences):
        raise ValueError(
            f"preferences must be finite and not negative, but got {list(preferences)}."
        )


def _objectives(gram: Tensor) -> int:
    check_tensor("gram", gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must be a square matrix, but got shape {tuple(gram.shape)}.")
    if gram.layout != torch.strided:
        raise TypeError(f"gram must be dense, but got layout {gram.layout}.")
    return gram.shape[0]


def _run(
    gram: Tensor,
    rule: str,
    preferences: Sequence[float] | None = None,
    *,
    normalize: bool = False,
    length: str = "mean",
) -> Solution:
    K = _objectives(gram)
    if not gram.dtype.is_floating_point:
        raise TypeError(f"gram must be of a floating dtype, but got {gram.dtype}.")
    refuse_transforms("the solver", [gram])
    c = [1.0] * K if preferences is None else [float(p) for p in preferences]
    return Solution(_solve(gram.detach().double(), rule, c, normalize, length))


def dual_space_weights(gram: Tensor, *, length: str = "mean") -> Solution:
    """The centre of the dual cone: the paper's common descent direction.

        r_i = g_i − proj(g_i onto span of the other gradients),  u_i = r_i / |r_i|
        Σ_k w_k g_k = τ Σ_i u_i / |Σ_i u_i|,   w ∝ G⁻¹α,  α_i = 1/√((G⁻¹)_ii)

    so that g_k · Σ w g = τ' α_k > 0 for every k: a step along the negative descends on every
    objective. Weights may be negative.

    An objective with G_kk below 1e-12 of the largest gets weight 0. Where the gradients are too
    nearly dependent for the u_i to mean anything, the min-norm point of the unit gradients' convex
    hull takes their place (Status.MIN_NORM); where that is 0 no common descent direction exists
    (Status.STATIONARY, weights 0). A non-finite entry gives Status.NON_FINITE and weights 0.

    Args:
        gram: [K, K], K ≥ 1; solved in float64. Up to 8 objectives in the compiled solver, more in
            NumPy on the host.
        length: τ = `mean` |(1/K) Σ g_i|, `min-norm` the distance from 0 to the gradients' convex
            hull (the step vanishes at Pareto-stationary points), `first` the norm of the first
            gradient that takes part. Where τ is 0 the status is STATIONARY.

    Raises:
        ValueError: gram is not square, or length is unknown.

    Source: arXiv 2412.20412, section III.B.

    Example:
        >>> import torch
        >>> g = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)  # they conflict
        >>> solution = dual_space_weights(g @ g.T)
        >>> solution.status.name
        'DUAL'
        >>> (g @ (solution.weights @ g) > 0).tolist()
        [True, True]
        >>> dual_space_weights(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).status.name  # opposite
        'STATIONARY'
    """
    return _run(gram, "dual", length=length)


def min_norm_weights(gram: Tensor, *, normalize: bool = False, length: str = "mean") -> Solution:
    """MGDA: the point of smallest norm in the convex hull of the gradients.

        w = argmin |Σ_k w_k g_k|²   over w ≥ 0, Σ_k w_k = 1

    Args:
        gram: [K, K].
        normalize: first scale every gradient to the norm `length`.
        length: as for `dual_space_weights`; used with `normalize` alone.

    Source: Désidéri, Multiple-gradient descent algorithm, 2012.

    Example:
        >>> import torch
        >>> min_norm_weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).weights
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    return _run(gram, "mgda", normalize=normalize, length=length)


def project_weights(
    gram: Tensor,
    preferences: Sequence[float] | None = None,
    *,
    normalize: bool = False,
    length: str = "mean",
) -> Solution:
    """The point of the dual cone {x : g_i · x ≥ 0 for all i} nearest to Σ_k c_k g_k.

    Nothing changes where the weighted sum harms no objective already. At a Pareto-stationary point
    no direction descends on every objective: Status.STATIONARY, weights 0.

    Args:
        gram: [K, K].
        preferences: c, not negative; default all 1.
        normalize: first scale every gradient to the norm `length`.
        length: as for `dual_space_weights`; used with `normalize` alone.

    Example:
        >>> import torch
        >>> at_peace = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> project_weights(at_peace, [1, 3]).weights  # the weighted sum, unchanged
        tensor([1., 3.], dtype=torch.float64)
        >>> at_odds = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> project_weights(at_odds, [1, 3]).weights  # as little more of the first as it needs
        tensor([1.5000, 3.0000], dtype=torch.float64)
    """
    return _run(gram, "project", preferences, normalize=normalize, length=length)


def upgrad_weights(
    gram: Tensor,
    preferences: Sequence[float] | None = None,
    *,
    normalize: bool = False,
    length: str = "mean",
) -> Solution:
    """The mean over k of the points of the dual cone nearest to c_k g_k.

    Arguments as for `project_weights`. Source: Quinton and Rey, arXiv 2406.16232, section 3.

    Example:
        >>> import torch
        >>> upgrad_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]])).weights
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    return _run(gram, "upgrad", preferences, normalize=normalize, length=length)
