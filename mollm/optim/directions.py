"""Rules: from the Gram matrix of the objectives' gradients to the weights of their combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mollm_ops import (
    Solution,
    Status,
    dual_space_weights,
    min_norm_weights,
    project_weights,
    upgrad_weights,
)
from mollm_ops.dual_space import active_objectives


class Rule(Protocol):
    """Gram matrix [K, K] in float64 → weights of Σ_k w_k g_k, with status and Pareto gap."""

    def __call__(self, gram: Tensor) -> Solution: ...


def sum_weights(gram: Tensor, preferences: Tensor) -> Tensor:
    """w_k = c_k: the gradient of the weighted sum of the losses."""
    return preferences


def pcgrad_weights(gram: Tensor, preferences: Tensor) -> Tensor:
    """PCGrad: each c_k g_k loses its component along every gradient it conflicts with, one after
    the other in the order of the objectives, and the results are added.

        h_i = c_i g_i;  for j ≠ i with h_i · g_j < 0:  h_i ← h_i − (h_i · g_j / |g_j|²) g_j

    The original draws the order of the j at random; a fixed order makes a run reproducible.

    Source: Yu et al., Gradient surgery for multi-task learning, 2020, algorithm 1.
    """
    rows = torch.diag(preferences)  # row i: h_i in terms of the g_k
    square = gram.diagonal()
    for j in range(len(gram)):
        along = rows @ gram[j]
        along[j] = 0
        share = along.clamp(max=0) / square[j].clamp(min=torch.finfo(gram.dtype).tiny)
        rows[:, j] -= share
    return rows.sum(0)


def retain_first_weights(gram: Tensor, preferences: Tensor) -> Tensor:
    """The first objective, forgetting, may not harm any of the others.

        d = Σ_{k>1} c_k g_k + P(c_1 g_1),   P: onto the nearest point of {x : g_k · x ≥ 0, k > 1}

    Where forgetting harms nobody this is the weighted sum. Zhou et al. take away all that lies in
    the span of the other gradients, here only what harms is.

    Source: after Zhou et al., Geometric-disentanglement unlearning, arXiv 2511.17100.
    """
    # P(g_1) lies on the side of g_1, so that the dual cone of all objectives may stand for that of
    # the others.
    projected = project_weights(gram, [1.0] + [0.0] * (len(gram) - 1)).weights
    weights = preferences[0] * projected
    weights[1:] += preferences[1:]
    return weights


def forget_first_weights(gram: Tensor, preferences: Tensor) -> Tensor:
    """The others together may not hinder the first objective, forgetting.

        h = Σ_{k>1} c_k g_k,   d = c_1 g_1 + h − min(0, h · g_1) g_1 / |g_1|²

    Source: after Reisizadeh et al., BLUR: a bi-level optimization approach for LLM unlearning,
    arXiv 2506.08164.
    """
    weights = preferences.clone()
    against = (gram[0, 1:] @ weights[1:]).clamp(max=0)
    weights[0] -= against / gram[0, 0].clamp(min=torch.finfo(gram.dtype).tiny)
    return weights


def _finished(gram: Tensor, weights: Tensor) -> Solution:
    """Adds status and Pareto gap to bare weights; non-finite weights become zeros."""
    finite = torch.isfinite(gram).all() & torch.isfinite(weights).all()
    gap = torch.as_tensor(min_norm_weights(gram)._packed[-1])
    status = torch.where(finite, int(Status.SOLVED), int(Status.NON_FINITE)).to(gram.dtype)
    return Solution(torch.cat([torch.where(finite, weights, 0.0), status[None], gap[None]]))


@dataclass(frozen=True)
class _Solver:
    """One of the rules that mollm_ops solves whole."""

    name: str
    preferences: tuple[float, ...]
    normalize: bool
    length: str

    def __call__(self, gram: Tensor) -> Solution:
        if self.name == "dual":
            return dual_space_weights(gram, length=self.length)
        if self.name == "mgda":
            return min_norm_weights(gram, normalize=self.normalize, length=self.length)
        solve = project_weights if self.name == "project" else upgrad_weights
        return solve(gram, self.preferences, normalize=self.normalize, length=self.length)


@dataclass(frozen=True)
class _Weighting:
    """A rule that returns bare weights, on the gradients as they are or scaled to unit norm."""

    weighting: Callable[[Tensor], Tensor]
    normalize: bool

    def __call__(self, gram: Tensor) -> Solution:
        known = torch.nan_to_num(gram, nan=0.0, posinf=0.0, neginf=0.0)
        scale = torch.ones_like(known[0])
        if self.normalize:
            scale = torch.where(active_objectives(known), known.diagonal().rsqrt(), 0.0)
        weights = self.weighting(known * scale[:, None] * scale)
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"direction must return a tensor of {len(gram)} weights, but got {got}."
            )
        return _finished(gram, weights.to(gram) * scale)


@dataclass(eq=False)
class _Preferred:
    """A bare rule with its preferences, as a function of the Gram matrix alone."""

    function: Callable[[Tensor, Tensor], Tensor]
    preferences: Tensor

    def __call__(self, gram: Tensor) -> Tensor:
        self.preferences = self.preferences.to(gram)  # waits for a GPU the first time only
        return self.function(gram, self.preferences)


_BARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pcgrad": pcgrad_weights,
    "sum": sum_weights,
    "retain-first": retain_first_weights,
    "forget-first": forget_first_weights,
}
_SOLVED = ("dual", "project", "upgrad", "mgda")
DIRECTIONS = (*_SOLVED, *_BARE)
_WITHOUT_PREFERENCES = ("dual", "mgda")

Direction = str | Callable[[Tensor], Tensor]


def uses_preferences(direction: Direction) -> bool:
    """Whether weights on the objectives make a difference to it."""
    return not callable(direction) and direction not in _WITHOUT_PREFERENCES


def uses_normalize(direction: Direction) -> bool:
    """Whether it makes a difference to scale the gradients first."""
    return direction != "dual"


def uses_length(direction: Direction, normalize: bool) -> bool:
    """Whether the length that directions or gradients are scaled to makes a difference."""
    return direction == "dual" or (normalize and direction in _SOLVED)


def make_rule(
    direction: Direction,
    *,
    objectives: int,
    preferences: Sequence[float] | None,
    normalize: bool,
    length: str,
) -> Rule:
    """The rule of that name, or a callable from Gram matrix to weights, as a Rule.

    Args:
        direction: one of DIRECTIONS, or a callable such as a TorchJD `Weighting`.
        objectives: K.
        preferences: c_k ≥ 0, one per objective; default all 1. `dual` and `mgda` and callables
            take none.
        normalize: give the rule the gradients scaled to a common norm: to `length` for `project`,
            `upgrad` and `mgda`, else to 1.
        length: see `mollm_ops.dual_space_weights`.
    """
    if preferences is not None and not uses_preferences(direction):
        raise ValueError(
            f"preferences must be None for direction {direction!r}, which does not use them, "
            f"but got {list(preferences)}."
        )
    c = tuple(float(p) for p in preferences) if preferences is not None else (1.0,) * objectives
    # Refuses bad preferences and lengths now, for every direction alike.
    project_weights(torch.eye(objectives, dtype=torch.float64), c, length=length)
    if callable(direction):
        return _Weighting(direction, normalize)
    if direction in _BARE:
        preferred = _Preferred(_BARE[direction], torch.tensor(c, dtype=torch.float64))
        return _Weighting(preferred, normalize)
    if direction not in _SOLVED:
        raise ValueError(
            f"direction must be one of {', '.join(DIRECTIONS)} or a callable on the Gram matrix, "
            f"but got {direction!r}."
        )
    return _Solver(direction, c, normalize, length)
