"""Unlearning cross-entropy on logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mollm_ops._checks import check_dtype, check_tensor
from mollm_ops._dtypes import name_of, wide_dtype
from mollm_ops._loss_arguments import check_eps, check_reduction, check_transforms, flat_target
from mollm_ops.operands import LogitTransform, RowLoss
from mollm_ops.rows import log_rows, refuse_double_backward, row_targets


@torch.library.custom_op("mollm::uce_rows", mutates_args=())
def _uce_rows(
    logits: Tensor,
    target: Tensor,
    eps: float,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Losses [N] of logits [N, V]."""
    _check_rows(logits, target)
    losses = logits.new_empty(len(logits), dtype=wide_dtype(logits.dtype))
    target = row_targets(target, logits.shape[1], ignore_index)
    to = RowLoss(losses, torch.ones_like(losses), None)
    log_rows(logits, target, to, eps, LogitTransform(logit_scale, softcap))
    return losses


@_uce_rows.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    eps: float,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    _check_rows(logits, target)
    return logits.new_empty(logits.shape[0], dtype=wide_dtype(logits.dtype))


@torch.library.custom_op("mollm::uce_rows_backward", mutates_args=())
def _uce_rows_backward(
    logits: Tensor,
    target: Tensor,
    upstream: Tensor,
    eps: float,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Gradient [N, V] of Σ_n upstream_n losses_n."""
    _check_rows(logits, target, upstream)
    losses = torch.empty_like(upstream, memory_format=torch.contiguous_format)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    target = row_targets(target, logits.shape[1], ignore_index)
    to = RowLoss(losses, upstream, gradient)
    log_rows(logits, target, to, eps, LogitTransform(logit_scale, softcap))
    return gradient


@_uce_rows_backward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    upstream: Tensor,
    eps: float,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    _check_rows(logits, target, upstream)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _check_rows(logits: Tensor, target: Tensor, *upstream: Tensor) -> None:
    """What the ops rely on, whoever calls them; the row kernels check the dtype of upstream."""
    check_dtype("logits", logits)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, but got {name_of(target.dtype)}.")
    for name, tensor in zip(("target", "upstream"), (target, *upstream), strict=False):
        if logits.ndim != 2 or tensor.shape != logits.shape[:1] or tensor.device != logits.device:
            raise ValueError(
                f"logits and {name} must be [N, V] and [N] on one device, but got "
                f"{list(logits.shape)} on {logits.device} and {list(tensor.shape)} on "
                f"{tensor.device}."
            )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    return _uce_rows_backward(*ctx.saved_tensors, upstream, *ctx.options), *[None] * 5


_uce_rows.register_autograd(_backward, setup_context=_save)


def uce_loss(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    *,
    eps: float = 1e-3,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Unlearning cross-entropy: bounded where gradient ascent on cross-entropy explodes.

        p = softmax(z)_t,   L = -log(1 - (1 - ε) p),
        ∂L/∂z_j = s (δ_jt - softmax(z)_j),  s = (1 - ε) p / (1 - (1 - ε) p)

    0 <= L <= -log ε and ‖∂L/∂z‖₁ <= 2 for every ε and every logit. L is least at p = 0, where it
    stops pushing. ε trades the height of the bound against the speed of the start: the gradient of
    a token that the model knows by heart, 1 - p much smaller than ε, vanishes like (1 - p) / ε.
    Both are exact for 1 - p as small as the logits can express; arithmetic is float32, or float64
    for float64 logits. Nothing but the logits is kept for backward.

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16.
        target: [...] integers in [0, V), or ignore_index: such rows count neither in the loss nor
            in its mean.
        eps: 1.2e-38 <= ε < 1; less for a model that knows the answers by heart.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for a
            loss per row, 0 where ignored.
        logit_scale, softcap: s and c of a model whose logits z are c tanh(s `logits` / c), or
            s `logits` without a cap.

    Returns:
        float32 (float64 for float64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes that do not fit, eps out of range, or a target outside [0, V). A GPU
            cannot say the last without a synchronisation: there the loss is NaN and the row's
            gradient zero.
        TypeError: another dtype.
        RuntimeError: backward with create_graph=True, for the second derivative is not implemented;
            torch.func.grad and jvp.

    Source: arXiv 2412.20412, section III.A.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[8.0, 0.0], [0.0, 8.0]], requires_grad=True)
        >>> loss = uce_loss(logits, torch.tensor([0, 0]), eps=1e-3, reduction="none")
        >>> [round(x, 4) for x in loss.tolist()]  # a memorised answer, and one already forgotten
        [6.6188, 0.0003]
        >>> loss.sum().backward()
        >>> logits.grad.abs().sum().item() < 4  # at most 2 a row
        True
    """
    check_eps(eps)
    check_reduction(reduction)
    check_tensor("logits", logits)
    check_dtype("logits", logits)
    check_transforms(logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, but got {list(logits.shape)}.")
    lead = logits.shape[:-1]
    target = flat_target(target, lead, logits.device)
    transform = LogitTransform(logit_scale, softcap)
    losses: Tensor = _uce_rows(
        logits.reshape(-1, logits.shape[-1]),
        target,
        eps,
        ignore_index,
        transform.scale,
        transform.softcap,
    )
    if reduction == "none":
        return losses.reshape(lead)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum().clamp(min=1)
