"""The linear losses as Torch ops: registration, shapes for tracing, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mollm_ops._chunks import Loss, losses_in_chunks
from mollm_ops._dtypes import gradient_dtype, wide_dtype
from mollm_ops._loss_arguments import Head, check_flat
from mollm_ops.operands import LogitTransform
from mollm_ops.rows import refuse_double_backward, row_targets

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias"


_HEAD = f"{_TENSORS}, float logit_scale, float? softcap"


_REFERENCE = (
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, float ref_logit_scale, "
    "float? ref_softcap"
)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Head:
    return Head(hidden, weight, bias, hidden.shape[:-1], LogitTransform(scale, softcap))


def _wanted(wants: Sequence[bool]) -> tuple[bool, bool, bool]:
    if len(wants) != 3:
        raise ValueError(f"wants must be three truth values, but got {list(wants)}.")
    return wants[0], wants[1], wants[2]


def _empty_result(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes for tracing."""
    losses = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden.dtype))
    dtype = gradient_dtype(hidden.dtype)
    gradients = [
        torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        if x is not None and wanted
        else hidden.new_empty(0)
        for x, wanted in zip((hidden, weight, bias), wants, strict=True)
    ]
    return losses, gradients[0], gradients[1], gradients[2]


@torch.library.custom_op(
    "mollm::linear_ce",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor target, Tensor scale, float? eps, int ignore_index, "
    f"bool wide_logits, bool[] wants, int? chunk_rows) -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_ce(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    target: Tensor,  # [N]
    scale: Tensor,  # [] or [N]
    eps: float | None,
    ignore_index: int,
    wide_logits: bool,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of Σ_n scale_n losses_n that are wanted."""
    head = _head(hidden, weight, bias, logit_scale, softcap)
    check_flat(head, None, target, scale, chunk_rows)
    losses, gradients = losses_in_chunks(
        head,
        None,
        row_targets(target, weight.shape[0], ignore_index),
        ce=Loss(scale, _wanted(wants)),
        kl=None,
        eps=eps,
        chunk_rows=chunk_rows,
        wide_logits=wide_logits,
    )
    return losses[0], *gradients[0]


@linear_ce.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    target: Tensor,
    scale: Tensor,
    eps: float | None,
    ignore_index: int,
    wide_logits: bool,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_flat(_head(hidden, weight, bias, 1.0, None), None, target, scale, chunk_rows)
    return _empty_result(hidden, weight, bias, wants)


@torch.library.custom_op(
    "mollm::linear_kl",
    mutates_args=(),
    schema=f"({_HEAD}, {_REFERENCE}, Tensor target, Tensor scale, bool[] wants, int? chunk_rows) "
    f"-> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_kl(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,  # [N, H_ref]
    ref_weight: Tensor,  # [V, H_ref]
    ref_bias: Tensor | None,  # [V]
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,  # [N], negative where a row does not count
    scale: Tensor,  # [] or [N]
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of Σ_n scale_n losses_n that are wanted."""
    head = _head(hidden, weight, bias, logit_scale, softcap)
    reference = _head(ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap)
    check_flat(head, reference, target, scale, chunk_rows)
    losses, gradients = losses_in_chunks(
        head,
        reference,
        target,
        ce=None,
        kl=Loss(scale, _wanted(wants)),
        eps=None,
        chunk_rows=chunk_rows,
        wide_logits=True,
    )
    return losses[0], *gradients[0]


@linear_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,
    scale: Tensor,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference = _head(ref_hidden, ref_weight, ref_bias, 1.0, None)
    check_flat(_head(hidden, weight, bias, 1.0, None), reference, target, scale, chunk_rows)
    return _empty_result(hidden, weight, bias, wants)


@torch.library.custom_op(
    "mollm::linear_ce_kl",
    mutates_args=(),
    schema=f"({_HEAD}, {_REFERENCE}, Tensor target, Tensor scale, int ignore_index, bool[] wants, "
    f"int? chunk_rows) -> "
    f"(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_ce_kl(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,  # [N, H_ref]
    ref_weight: Tensor,  # [V, H_ref]
    ref_bias: Tensor | None,  # [V]
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,  # [N]
    scale: Tensor,  # [] or [N]
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What linear_ce returns, then what linear_kl returns, from one projection of hidden."""
    head = _head(hidden, weight, bias, logit_scale, softcap)
    reference = _head(ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap)
    check_flat(head, reference, target, scale, chunk_rows)
    losses, gradients = losses_in_chunks(
        head,
        reference,
        row_targets(target, weight.shape[0], ignore_index),
        ce=Loss(scale, _wanted(wants)),
        kl=Loss(scale, _wanted(wants)),
        eps=None,
        chunk_rows=chunk_rows,
        wide_logits=True,
    )
    return losses[0], *gradients[0], losses[1], *gradients[1]


@linear_ce_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    reference = _head(ref_hidden, ref_weight, ref_bias, 1.0, None)
    check_flat(_head(hidden, weight, bias, 1.0, None), reference, target, scale, chunk_rows)
    ce, kl = (_empty_result(hidden, weight, bias, wants) for _ in range(2))
    return *ce, *kl


@torch.library.custom_op(
    "mollm::join_gradients",
    mutates_args=(),
    schema=f"(Tensor loss, {_TENSORS}, Tensor d_hidden, Tensor d_weight, Tensor d_bias) -> Tensor",
)
def join_gradients(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> Tensor:
    """loss, whose gradients with respect to hidden, weight and bias are the last three."""
    return loss.clone()


@join_gradients.register_fake
def _(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op(
    "mollm::join_ce",
    mutates_args=(),
    schema=f"(Tensor losses, {_HEAD}, Tensor target, float? eps, int ignore_index, "
    f"bool wide_logits, int? chunk_rows) -> Tensor",
)
def join_ce(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    target: Tensor,
    eps: float | None,
    ignore_index: int,
    wide_logits: bool,
    chunk_rows: int | None,
) -> Tensor:
    """losses [N] of linear_ce, whose gradients are computed when the upstream ones are known."""
    return losses.clone()


@join_ce.register_fake
def _(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    target: Tensor,
    eps: float | None,
    ignore_index: int,
    wide_logits: bool,
    chunk_rows: int | None,
) -> Tensor:
    return torch.empty_like(losses)


@torch.library.custom_op(
    "mollm::join_kl",
    mutates_args=(),
    schema=f"(Tensor losses, {_HEAD}, {_REFERENCE}, Tensor target, int? chunk_rows) -> Tensor",
)
def join_kl(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    """losses [N] of linear_kl, whose gradients are computed when the upstream ones are known."""
    return losses.clone()


@join_kl.register_fake
def _(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    target: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    return torch.empty_like(losses)


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream · gradient, in the gradient's own memory where this backward is its last use."""
    if type(gradient) is not Tensor:  # traced: the compiler plans the memory
        return (gradient * upstream.to(gradient.dtype)).to(dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * upstream).to(dtype)
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient.to(dtype)
    return gradient.mul_(upstream).to(dtype)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*inputs[4:7])


def join_gradients_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    gradients = (
        _scaled(gradient, upstream, ctx.dtype) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:4], strict=True)
    )
    return None, *gradients, None, None, None


def _save_ce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.logit_scale, ctx.softcap, target = inputs[:7]
    ctx.options = inputs[7:]
    ctx.save_for_backward(*tensors, target)


def join_ce_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    *tensors, target = ctx.saved_tensors
    *options, chunk_rows = ctx.options
    wants = list(ctx.needs_input_grad[1:4])
    head = *tensors, ctx.logit_scale, ctx.softcap
    _, *gradients = linear_ce(*head, target, upstream, *options, wants, chunk_rows)
    return None, *_where(wants, gradients, tensors[0].dtype), *[None] * 7


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *head, target, ctx.chunk_rows = inputs
    *tensors, ctx.logit_scale, ctx.softcap = head[:5]
    *ref_tensors, ctx.ref_logit_scale, ctx.ref_softcap = head[5:]
    ctx.save_for_backward(*tensors, *ref_tensors, target)


def join_kl_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    *tensors, target = ctx.saved_tensors
    head = *tensors[:3], ctx.logit_scale, ctx.softcap
    reference = *tensors[3:], ctx.ref_logit_scale, ctx.ref_softcap
    wants = list(ctx.needs_input_grad[1:4])
    _, *gradients = linear_kl(*head, *reference, target, upstream, wants, ctx.chunk_rows)
    return None, *_where(wants, gradients, tensors[0].dtype), *[None] * 9


def _where(
    wants: Sequence[bool], gradients: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor | None]:
    return [g.to(dtype) if wanted else None for g, wanted in zip(gradients, wants, strict=True)]


join_gradients.register_autograd(join_gradients_backward, setup_context=_save_gradients)


join_ce.register_autograd(join_ce_backward, setup_context=_save_ce)


join_kl.register_autograd(join_kl_backward, setup_context=_save_kl)
