"""The dual-space solver once more, in NumPy and in the paper's symbols.

It is the definition that csrc/dual_space.h is compared with, the solver for more than eight
objectives, and the one in use where the extension is missing. Source: arXiv 2412.20412,
section III.B; MGDA: Désidéri 2012; the quadratic problems: Lawson and Hanson 1974.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DUAL, MIN_NORM, STATIONARY, NON_FINITE, SOLVED = range(5)

NEGLIGIBLE = 1e-12
EDGE = 1e-6
STATIONARY_GAP = 1e-6
CERTIFICATE = 1e-9


@dataclass
class Verdict:
    """Weights of Σ w_k g_k, status and Pareto gap."""

    weights: Array
    status: int
    pareto_gap: float


def nnls(A: Array, b: Array) -> Array:
    """argmin ½ yᵀAy − bᵀy over y ≥ 0, A positive semidefinite, by active sets."""
    n = len(b)
    unit = 1 / np.sqrt(A.diagonal())  # variables in which A has a unit diagonal
    A, b = A * unit[:, None] * unit, b * unit
    y = np.zeros(n)
    free = np.zeros(n, dtype=bool)
    tolerance = 1e-13 * float(np.abs(b).max(initial=0.0))
    for _ in range(10 * n + 10):
        slope = np.where(free, -np.inf, b - A @ y)
        candidate = int(slope.argmax())
        if slope[candidate] <= tolerance:
            break
        free[candidate] = True
        while free.any():
            target = np.zeros(n)
            target[free] = np.linalg.lstsq(A[np.ix_(free, free)], b[free], rcond=1e-14)[0]
            blocked = free & (target <= 0)
            if not blocked.any():
                y = target
                break
            gap = np.maximum(y[blocked] - target[blocked], np.finfo(float).tiny)
            y = y + float(np.min(y[blocked] / gap)) * (target - y)
            free &= y > 1e-15 * float(np.max(y))
            y[~free] = 0
        if not free[candidate]:
            break
    return y * unit


def min_norm_point(G: Array) -> tuple[Array, float]:
    """Convex weights of the hull's point nearest to 0, and its norm.

    With y = w / (wᵀGw + 1), the conditions of the hull's problem are those of nnls(G + 11ᵀ, 1).
    """
    y = nnls(G / float(G.diagonal().min()) + 1, np.ones(len(G)))
    w = y / y.sum()
    return w, float(np.sqrt(max(float(w @ G @ w), 0.0)))


def length_of(G: Array, active: NDArray[np.intp], length: str) -> float:
    """τ: `mean` |(1/K) Σ g_i|, `first` |g_i| of the first that takes part, `min-norm` distance of
    the hull from 0."""
    if length == "first":
        return float(np.sqrt(G[active[0], active[0]]))
    if length == "mean":
        return float(np.sqrt(max(float((G / len(G) ** 2).sum()), 0.0)))
    return min_norm_point(G[np.ix_(active, active)])[1]


def _norm(C: Array, y: Array) -> float:
    return float(np.sqrt(max(float(y @ C @ y), 0.0)))


def _descends_on_all(C: Array, y: Array) -> bool:
    return bool((C @ y > CERTIFICATE * _norm(C, y)).all())


def dual_centre(C: Array) -> Array | None:
    """λ = C⁻¹α with α_i = 1/√((C⁻¹)_ii) = |r_i|, so that Σ λ_k ĝ_k = Σ_i u_i."""
    try:
        inverse = np.linalg.inv(C)
    except np.linalg.LinAlgError:
        return None
    diagonal = inverse.diagonal()
    if not ((diagonal > 0) & (diagonal < 1 / EDGE)).all():
        return None
    lam: Array = inverse @ (1 / np.sqrt(diagonal))
    return lam if _descends_on_all(C, lam) else None


def projection(C: Array, c: Array) -> Array:
    """Coefficients of the point of {x : ĝ_i · x ≥ 0} nearest to Σ c_i ĝ_i."""
    return c + nnls(C, -C @ c)


def solve(
    G: Array, rule: str, preferences: Array | None = None, *, normalize: bool, length: str
) -> Verdict:
    """One of the rules `dual`, `mgda`, `project`, `upgrad`, as defined in mollm_ops.dual_space."""
    K = len(G)
    zero = np.zeros(K)
    if not np.isfinite(G).all():
        return Verdict(zero, NON_FINITE, 0.0)
    square = G.diagonal()
    active = np.flatnonzero((square > 0) & (square >= NEGLIGIBLE * square.max()))
    if len(active) == 0:
        return Verdict(zero, STATIONARY, 0.0)
    norms = np.sqrt(square[active])
    C = G[np.ix_(active, active)] / norms[:, None] / norms
    np.fill_diagonal(C, 1.0)
    hull, gap = min_norm_point(C)
    gap = min(gap, 1.0)

    def verdict(y: Array, status: int, scale: float = 1.0) -> Verdict:
        weights = zero.copy()
        weights[active] = scale * y / norms
        return Verdict(weights, status, gap)

    tau = length_of(G, active, length) if normalize or rule == "dual" else 1.0
    stationary = Verdict(zero, STATIONARY, gap)
    if not tau > 0:
        return stationary
    if rule == "dual":
        lam = dual_centre(C)
        if lam is not None:
            return verdict(lam, DUAL, tau / _norm(C, lam))
        if gap > STATIONARY_GAP and _descends_on_all(C, hull):
            return verdict(hull, MIN_NORM, tau / _norm(C, hull))
        return stationary
    if gap <= STATIONARY_GAP:
        return stationary
    if rule == "mgda":
        if normalize:
            return verdict(hull, MIN_NORM, tau)
        w, _ = min_norm_point(G[np.ix_(active, active)])
        return verdict(w * norms, MIN_NORM)
    c = (np.ones(K) if preferences is None else preferences)[active]
    c = c if normalize else c * norms
    size = float(np.abs(c).max())
    if size == 0:
        return stationary
    if rule == "project":
        y = projection(C, c / size)
    else:
        y = np.sum([projection(C, e) for e in np.diag(c / size / K)], axis=0)
    if _norm(C, y) <= STATIONARY_GAP:
        return stationary
    return verdict(y, SOLVED, size * tau)


def as_array(gram: Any) -> Array:
    """A Gram matrix as float64 NumPy."""
    return np.asarray(gram, dtype=np.float64)
