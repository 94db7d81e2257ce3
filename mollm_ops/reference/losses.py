"""The losses as defined: plain Torch, any dtype and device, gradients by autograd.

Symbols as in arXiv 2412.20412: z are the logits of one token, t its target, p = softmax(z). All
arithmetic is in float32, in float64 where the input is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mollm_ops._dtypes import wide_dtype
from mollm_ops.operands import IDENTITY, LogitTransform


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """z₀ = h W' + b in the wide dtype, and z = c tanh(s z₀ / c), or s z₀ without a cap."""
    wide = wide_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(wide)
    return transform(F.linear(hidden.to(wide), weight.to(wide), bias))


def reduce_rows(
    losses: Tensor, counted: Tensor, reduction: str, normalizer: float | Tensor | None = None
) -> Tensor:
    """Losses of the counted rows: each ("none", 0 elsewhere), their sum, or sum / normalizer."""
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (counted.sum().clamp(min=1) if normalizer is None else normalizer)


def ce_rows_reference(z: Tensor, t: Tensor, eps: float | None) -> Tensor:
    """-log p_t, or with an eps -log(1 - (1 - eps) p_t), of every row; rows with t < 0 are anything.

    1 - (1 - eps) p_t is the share of the softmax's denominator that is left when exp(z_t) is
    multiplied by eps, so its logarithm is a difference of two log-sum-exps.
    """
    at_target = F.one_hot(t.clamp(min=0), z.shape[-1]).bool()
    lse = torch.logsumexp(z, dim=-1)
    if eps is None:
        return lse - torch.where(at_target, z, 0).sum(-1)
    log_eps = torch.log(torch.tensor(eps, dtype=z.dtype, device=z.device))
    return lse - torch.logsumexp(torch.where(at_target, z + log_eps, z), dim=-1)


def kl_rows_reference(z: Tensor, z_ref: Tensor) -> Tensor:
    """KL(p_ref || p) = Σ_j p_ref_j (log p_ref_j - log p_j) of every row."""
    return F.kl_div(
        F.log_softmax(z, dim=-1), F.log_softmax(z_ref, dim=-1), reduction="none", log_target=True
    ).sum(-1)


def uce_loss_reference(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    *,
    eps: float = 1e-3,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """L = -log(1 - (1 - eps) p_t); see `mollm_ops.uce_loss`."""
    counted = target != ignore_index
    z = LogitTransform(logit_scale, softcap)(logits.to(wide_dtype(logits.dtype)))
    losses = ce_rows_reference(z, torch.where(counted, target, 0), eps)
    return reduce_rows(losses, counted, reduction)


def linear_cross_entropy_reference(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """L = -log softmax(z)_t; see `mollm_ops.linear_cross_entropy`."""
    counted = target != ignore_index
    z = project(hidden, weight, bias, LogitTransform(logit_scale, softcap))
    losses = ce_rows_reference(z, torch.where(counted, target, 0), eps=None)
    return reduce_rows(losses, counted, reduction, normalizer)


def linear_uce_loss_reference(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    eps: float = 1e-3,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """L = -log(1 - (1 - eps) softmax(z)_t); see `mollm_ops.linear_uce_loss`."""
    counted = target != ignore_index
    z = project(hidden, weight, bias, LogitTransform(logit_scale, softcap))
    losses = ce_rows_reference(z, torch.where(counted, target, 0), eps)
    return reduce_rows(losses, counted, reduction, normalizer)


def linear_kl_div_reference(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [..., H_ref]
    ref_weight: Tensor | None = None,  # [V, H_ref]
    *,
    mask: Tensor | None = None,  # [...]
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
) -> Tensor:
    """KL(p_ref || p), the reference a constant; see `mollm_ops.linear_kl_div`."""
    transform = LogitTransform(logit_scale, softcap)
    ref_transform = LogitTransform(
        logit_scale if ref_logit_scale is None else ref_logit_scale,
        softcap if ref_softcap is None else ref_softcap,
    )
    with torch.no_grad():
        ref_weight = weight if ref_weight is None else ref_weight
        z_ref = project(ref_hidden, ref_weight, ref_bias, ref_transform)
    losses = kl_rows_reference(project(hidden, weight, bias, transform), z_ref)
    counted = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask.bool()
    return reduce_rows(losses, counted, reduction, normalizer)


def linear_ce_kl_reference(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    ref_hidden: Tensor,  # [..., H_ref]
    ref_weight: Tensor | None = None,  # [V, H_ref]
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Both losses over the rows with a target; see `mollm_ops.linear_ce_kl`."""
    ce = linear_cross_entropy_reference(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    kl = linear_kl_div_reference(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        mask=target != ignore_index,
        bias=bias,
        ref_bias=ref_bias,
        reduction=reduction,
        normalizer=normalizer,
        logit_scale=logit_scale,
        softcap=softcap,
        ref_logit_scale=ref_logit_scale,
        ref_softcap=ref_softcap,
    )
    return ce, kl
