"""The optimizer step once more, in float64 and in the paper's symbols, for comparison.

One function per base optimizer; state travels in a dict. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mollm_ops.reference.gram import gram_reference


@dataclass
class State:
    """What a base optimizer keeps for each parameter: moments and the number of steps."""

    t: int = 0
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)


def direction(gradients: list[list[Tensor]], rule: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """d = Σ_k w_k g_k with w = rule(G), G_ij = g_i · g_j."""
    w = rule(gram_reference(gradients))
    return [
        sum((w[k] * g[n].double() for k, g in enumerate(gradients)), torch.zeros((), dtype=w.dtype))
        for n in range(len(gradients[0]))
    ]


def sgd_step(theta: list[Tensor], d: list[Tensor], state: State, *, lr: float, mu: float) -> None:
    """m ← μ m + d (m = d at first),  θ ← θ − lr m."""
    state.m = [mu * m + g for m, g in zip(state.m, d, strict=True)] if state.t else list(d)
    state.t += 1
    for p, m in zip(theta, state.m, strict=True):
        p -= lr * m


def adamw_step(
    theta: list[Tensor],
    d: list[Tensor],
    state: State,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """θ ← (1 − lr λ) θ − lr m̂ / (√v̂ + ε), the moments as in Loshchilov and Hutter 2019."""
    if state.t == 0:
        state.m = [torch.zeros_like(g) for g in d]
        state.v = [torch.zeros_like(g) for g in d]
    state.t += 1
    b1, b2 = betas
    for n, (p, g) in enumerate(zip(theta, d, strict=True)):
        state.m[n] = b1 * state.m[n] + (1 - b1) * g
        state.v[n] = b2 * state.v[n] + (1 - b2) * g * g
        m_hat = state.m[n] / (1 - b1**state.t)
        v_hat = state.v[n] / (1 - b2**state.t)
        p *= 1 - lr * weight_decay
        p -= lr * m_hat / (v_hat.sqrt() + eps)


def per_objective_adamw_step(
    theta: list[Tensor],
    gradients: list[list[Tensor]],
    rule: Callable[[Tensor], Tensor],
    state: State,
    means: list[list[Tensor]],
    *,
    lr: float,
    beta: float,
    beta2: float,
    eps: float,
) -> None:
    """M_k ← β M_k + (1 − β) g_k,  w from the Gram matrix of M_k / (1 − β^t),  AdamW with β₁ = 0."""
    for mean, g in zip(means, gradients, strict=True):
        for n, t in enumerate(g):
            mean[n] = beta * mean[n] + (1 - beta) * t
    corrected = [[m / (1 - beta ** (state.t + 1)) for m in mean] for mean in means]
    d = direction(corrected, rule)
    adamw_step(theta, d, state, lr=lr, betas=(0.0, beta2), eps=eps, weight_decay=0.0)


def metric_adamw_step(
    theta: list[Tensor],
    gradients: list[list[Tensor]],
    rule: Callable[[Tensor], Tensor],
    state: State,
    *,
    lr: float | list[float],
    beta2: float | list[float],
    eps: float | list[float],
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """v ← β₂ v + (1 − β₂) Σ_k c_k² g_k²,  c = rule(I),  P = r / (√v̂ + ε),  w = rule(g_i · P g_j),
    θ ← θ − lr P Σ_k w_k g_k  with r = lr_n / lr and lr = max_n lr_n; lr_n, β₂ and ε are one number
    or one for each parameter n. With `clip` s, s g_k takes the place of g_k in v and in the sum.

    Returns G and w."""
    K, N = len(gradients), len(theta)
    lrs, betas, epses = (x if isinstance(x, list) else [x] * N for x in (lr, beta2, eps))
    c = rule(torch.eye(K, dtype=torch.float64))
    if state.t == 0:
        state.v = [torch.zeros_like(t) for t in gradients[0]]
    state.t += 1
    P = []
    for n, (r, b, e) in enumerate(zip(lrs, betas, epses, strict=True)):
        terms = (c[k] ** 2 * (clip * g[n]) ** 2 for k, g in enumerate(gradients))
        square = sum(terms, torch.zeros_like(theta[n]))
        state.v[n] = b * state.v[n] + (1 - b) * square
        P.append(r / max(lrs) / ((state.v[n] / (1 - b**state.t)).sqrt() + e))
    scaled = [[p.sqrt() * t for p, t in zip(P, g, strict=True)] for g in gradients]
    G = gram_reference(scaled)
    w = rule(G)
    for n, p in enumerate(theta):
        p -= max(lrs) * P[n] * clip * sum(w[k] * gradients[k][n] for k in range(K))
    return G, w
