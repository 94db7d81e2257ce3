"""The Gram matrix, running means, Adam's metric and the weighted sum as defined."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mollm_ops._checks import GradientLists
from mollm_ops.operands import AdamMetric, RunningMeans, largest_moment

_CHUNK = 1 << 22  # elements that the plain-Torch versions hold in float64 at a time


def slices(tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The K gradients of one parameter, flattened and cut into pieces of at most _CHUNK."""
    flat = [None if t is None else t.detach().reshape(-1) for t in tensors]
    count = max(t.numel() for t in flat if t is not None)
    starts = range(0, count, _CHUNK)
    return [[None if t is None else t[a : a + _CHUNK] for t in flat] for a in starts]


def gram_reference(gradients: GradientLists) -> Tensor:
    """G_ij = g_i · g_j with every product and sum in float64; see `gram`."""
    device = next(t.device for tensors in gradients for t in tensors if t is not None)
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    for tensors in zip(*gradients, strict=True):
        rows = [k for k, t in enumerate(tensors) if t is not None]
        if not rows:
            continue
        for piece in slices(tensors):
            M = torch.stack([piece[k].double() for k in rows])  # type: ignore[union-attr]
            total[torch.tensor(rows)[:, None], torch.tensor(rows)] += M @ M.T
    return total


def moved_means_reference(
    gradients: GradientLists, moving: RunningMeans
) -> list[list[Tensor | None]]:
    """β m_k + (1 − β) g_k, rounded to the dtype of m_k; see `RunningMeans`."""

    def moved(g: Tensor | None, m: Tensor | None) -> Tensor | None:
        if g is None or m is None:
            return None
        return (moving.beta * m.double() + (1 - moving.beta) * g.double()).to(m.dtype)

    return [
        [moved(g, m) for g, m in zip(tensors, means, strict=True)]
        for tensors, means in zip(gradients, moving.means, strict=True)
    ]


def scaled_by_metric_reference(
    gradients: GradientLists, metric: AdamMetric
) -> list[list[Tensor | None]]:
    """√P g_k in float64, whose plain Gram matrix is that of the metric; see `AdamMetric`. NaN where
    the step could not compute or store v'."""
    columns = []
    moments = zip(metric.exp_avg_sqs, metric.steps, strict=True)
    for tensors, (v, step) in zip(zip(*gradients, strict=True), moments, strict=True):
        wide = [None if t is None else t.detach().double() for t in tensors]
        present = [(c, t) for c, t in zip(metric.weights, wide, strict=True) if t is not None]
        if present:
            square = sum((c * t * t for c, t in present), torch.zeros_like(present[0][1]))
            old = torch.zeros_like(square) if v is None else v.double()
            moment = metric.beta2 * old + (1 - metric.beta2) * square
            stored = [t.dtype for t in (*tensors, v) if t is not None]
            computed = functools.reduce(torch.promote_types, stored, torch.float32)
            kept = computed if v is None else v.dtype
            fits = (square <= largest_moment(computed)) & (moment <= largest_moment(kept))
            correction = 1 - metric.beta2 ** (step.double() + 1)
            P = torch.where(fits, 1 / ((moment / correction).sqrt() + metric.eps), torch.nan)
            wide = [None if t is None else P.sqrt() * t for t in wide]
        columns.append(wide)
    return [list(row) for row in zip(*columns, strict=True)]


def gram_moved_reference(
    gradients: GradientLists, moving: RunningMeans | None, metric: AdamMetric | None
) -> Tensor:
    """`gram_reference` of the means that come next, or in Adam's metric; a slice at a time."""
    K = len(gradients)
    device = next(t.device for tensors in gradients for t in tensors if t is not None)
    total = torch.zeros(K, K, dtype=torch.float64, device=device)
    for n, column in enumerate(zip(*gradients, strict=True)):
        if all(t is None for t in column):
            continue
        means = [None] * K if moving is None else [row[n] for row in moving.means]
        second = None if metric is None else metric.exp_avg_sqs[n]
        for piece in slices([*column, *means, second]):
            rows: GradientLists = [[t] for t in piece[:K]]
            if moving is not None:
                rows = moved_means_reference(
                    rows, RunningMeans([[t] for t in piece[K:-1]], moving.beta)
                )
            if metric is not None:
                here = replace(metric, exp_avg_sqs=[piece[-1]], steps=[metric.steps[n]])
                rows = scaled_by_metric_reference(rows, here)
            total += gram_reference(rows)
    return total


def combine_reference(gradients: GradientLists, weights: Tensor) -> list[Tensor | None]:
    """Σ_k w_k g_k in float64, rounded once to the gradients' dtype; see `combine`."""
    combined: list[Tensor | None] = []
    for tensors in zip(*gradients, strict=True):
        terms = [
            w * t.double()
            for w, t in zip(weights, tensors, strict=True)
            if t is not None and w != 0
        ]
        like = next((t for t in tensors if t is not None), None)
        if like is None:
            combined.append(None)
        else:
            combined.append(sum(terms, torch.zeros_like(like, dtype=torch.float64)).to(like.dtype))
    return combined
