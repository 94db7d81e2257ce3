"""Losses of a projection onto the vocabulary that never hold the logits of all tokens at once.

Tokens are worked on in chunks: one GEMM for the chunk's logits, one row kernel that turns them into
losses and, in place, gradients, two GEMMs for the gradients of hidden and weight. The gradients of
a mean or a sum are ready when the forward pass ends, 6 M H V operations in all (KL: 8); backward
scales them. Losses that are not reduced learn their tokens' upstream gradients only in backward
and project once more there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mollm_ops._chunks import Loss, losses_in_chunks
from mollm_ops._loss_arguments import (
    Head,
    check_chunk_rows,
    check_eps,
    check_reduction,
    flat_target,
    head_of,
    mask_target,
    reference_head_of,
    scale_of,
)
from mollm_ops.reference import wide_dtype
from mollm_ops.rows import refuse_double_backward, row_targets

# ---- losses and gradients together, without autograd

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_REFERENCE = "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    return Head(hidden, weight, bias, hidden.shape[:-1])


def _wanted(wants: Sequence[bool]) -> tuple[bool, bool, bool]:
    return wants[0], wants[1], wants[2]


def _empty_result(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes for tracing."""
    losses = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden.dtype))
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if x is not None and wanted
        else hidden.new_empty(0)
        for x, wanted in zip((hidden, weight, bias), wants, strict=True)
    ]
    return losses, gradients[0], gradients[1], gradients[2]


@torch.library.custom_op(
    "mollm::linear_ce",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor target, Tensor scale, float? eps, int ignore_index, bool[] wants, "
    f"int? chunk_rows) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_ce(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    scale: Tensor,  # [] or [N]
    eps: float | None,
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of Σ_n scale_n losses_n that are wanted."""
    losses, gradients = losses_in_chunks(
        _head(hidden, weight, bias),
        None,
        row_targets(target, weight.shape[0], ignore_index),
        ce=Loss(scale, _wanted(wants)),
        kl=None,
        eps=eps,
        chunk_rows=chunk_rows,
    )
    return losses[0], *gradients[0]


@_linear_ce.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    eps: float | None,
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_result(hidden, weight, bias, wants)


@torch.library.custom_op(
    "mollm::linear_kl",
    mutates_args=(),
    schema=f"({_HEAD}, {_REFERENCE}, Tensor target, Tensor scale, bool[] wants, int? chunk_rows) "
    f"-> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_kl(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ref_hidden: Tensor,  # [N, H_ref]
    ref_weight: Tensor,  # [V, H_ref]
    ref_bias: Tensor | None,  # [V]
    target: Tensor,  # [N], negative where a row does not count
    scale: Tensor,  # [] or [N]
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of Σ_n scale_n losses_n that are wanted."""
    losses, gradients = losses_in_chunks(
        _head(hidden, weight, bias),
        _head(ref_hidden, ref_weight, ref_bias),
        target,
        ce=None,
        kl=Loss(scale, _wanted(wants)),
        eps=None,
        chunk_rows=chunk_rows,
    )
    return losses[0], *gradients[0]


@_linear_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_result(hidden, weight, bias, wants)


@torch.library.custom_op(
    "mollm::linear_ce_kl",
    mutates_args=(),
    schema=f"({_HEAD}, {_REFERENCE}, Tensor target, Tensor scale, int ignore_index, bool[] wants, "
    f"int? chunk_rows) -> "
    f"(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_ce_kl(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ref_hidden: Tensor,  # [N, H_ref]
    ref_weight: Tensor,  # [V, H_ref]
    ref_bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    scale: Tensor,  # [] or [N]
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What linear_ce returns, then what linear_kl returns, from one projection of hidden."""
    losses, gradients = losses_in_chunks(
        _head(hidden, weight, bias),
        _head(ref_hidden, ref_weight, ref_bias),
        row_targets(target, weight.shape[0], ignore_index),
        ce=Loss(scale, _wanted(wants)),
        kl=Loss(scale, _wanted(wants)),
        eps=None,
        chunk_rows=chunk_rows,
    )
    return losses[0], *gradients[0], losses[1], *gradients[1]


@_linear_ce_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    wants: Sequence[bool],
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ce, kl = (_empty_result(hidden, weight, bias, wants) for _ in range(2))
    return *ce, *kl


# ---- autograd: a value that is already known is joined to the inputs it depends on


@torch.library.custom_op(
    "mollm::join_gradients",
    mutates_args=(),
    schema=f"(Tensor loss, {_HEAD}, Tensor d_hidden, Tensor d_weight, Tensor d_bias) -> Tensor",
)
def _join_gradients(
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


@_join_gradients.register_fake
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
    f"int? chunk_rows) -> Tensor",
)
def _join_ce(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    eps: float | None,
    ignore_index: int,
    chunk_rows: int | None,
) -> Tensor:
    """losses [N] of linear_ce, whose gradients are computed when the upstream ones are known."""
    return losses.clone()


@_join_ce.register_fake
def _(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    eps: float | None,
    ignore_index: int,
    chunk_rows: int | None,
) -> Tensor:
    return torch.empty_like(losses)


@torch.library.custom_op(
    "mollm::join_kl",
    mutates_args=(),
    schema=f"(Tensor losses, {_HEAD}, {_REFERENCE}, Tensor target, int? chunk_rows) -> Tensor",
)
def _join_kl(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    """losses [N] of linear_kl, whose gradients are computed when the upstream ones are known."""
    return losses.clone()


@_join_kl.register_fake
def _(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    return torch.empty_like(losses)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """upstream · gradient, in the gradient's own memory where this backward is its last use."""
    if type(gradient) is not Tensor:  # traced: the compiler plans the memory
        return gradient * upstream.to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient
    return gradient.mul_(upstream)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[4:7])


def _join_gradients_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    gradients = (
        _scaled(gradient, upstream) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:4], strict=True)
    )
    return None, *gradients, None, None, None


def _save_ce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, target)


def _join_ce_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    hidden, weight, bias, target = ctx.saved_tensors
    eps, ignore_index, chunk_rows = ctx.options
    wants = list(ctx.needs_input_grad[1:4])
    _, *gradients = _linear_ce(
        hidden, weight, bias, target, upstream, eps, ignore_index, wants, chunk_rows
    )
    return None, *_where(wants, gradients), None, None, None, None


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_rows = inputs[1:]
    ctx.save_for_backward(*tensors)


def _join_kl_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    wants = list(ctx.needs_input_grad[1:4])
    _, *gradients = _linear_kl(*ctx.saved_tensors, upstream, wants, ctx.chunk_rows)
    return None, *_where(wants, gradients), None, None, None, None, None


def _where(wants: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [g if wanted else None for g, wanted in zip(gradients, wants, strict=True)]


_join_gradients.register_autograd(_join_gradients_backward, setup_context=_save_gradients)
_join_ce.register_autograd(_join_ce_backward, setup_context=_save_ce)
_join_kl.register_autograd(_join_kl_backward, setup_context=_save_kl)


# ---- public functions


def _forward_wants(reduction: str, head: Head) -> list[bool]:
    """Gradients to compute in the forward pass: none where upstream gradients differ by token."""
    return [False] * 3 if reduction == "none" else list(head.wants())


def _ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    eps: float | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    chunk_rows: int | None,
) -> Tensor:
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias)
    target = flat_target(target, head.lead, hidden.device)
    scale = scale_of(reduction, normalizer, target != ignore_index, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    losses, *gradients = _linear_ce(
        *head.detach().tensors, target, scale, eps, ignore_index, wants, chunk_rows
    )
    if reduction == "none":
        joined: Tensor = _join_ce(losses, *head.tensors, target, eps, ignore_index, chunk_rows)
        return joined.reshape(head.lead)
    loss: Tensor = _join_gradients(losses.sum() * scale, *head.tensors, *gradients)
    return loss


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of a projection onto the vocabulary, without the logits of all tokens.

        z = h W' + b,   L = -log softmax(z)_t,   ∂L/∂z_j = softmax(z)_j - δ_jt

    Logits are rounded to the inputs' dtype, as a linear layer's are; everything between them and
    the gradients is float32, and dW is added up over chunks in float32 (float64 throughout for
    float64 inputs). A frozen weight costs no GEMM and no memory. Rows with target ignore_index
    count neither in the loss nor in its mean; on the CPU they cost no GEMM either, a GPU does not
    tell the host how many they are without a synchronisation. The op traces into a compiled graph
    in one piece.

    Args:
        hidden: [..., H], float32, float64, bfloat16 or float16; under autocast the autocast dtype.
        weight: [V, H], the head, of hidden's dtype.
        target: [...] integers in [0, V), or ignore_index.
        bias: [V] of hidden's dtype.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for a
            loss per row, 0 where ignored. "none" projects once more in backward.
        normalizer: what "mean" divides by instead, for instance the number of answer tokens in all
            micro-batches of a step. A number, or a tensor of one element on any device.
        chunk_rows: rows of logits to hold at a time; the default keeps them near 1 GiB on a GPU
            and 256 MiB on a CPU.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes that do not fit, or a target outside [0, V). A GPU cannot say so without
            a synchronisation: there the loss is NaN and the row's gradient zero.
        TypeError: another dtype, or dtypes that differ.
        RuntimeError: backward with create_graph=True, for the second derivative is not implemented;
            torch.func.grad and jvp.
    """
    return _ce(
        hidden,
        weight,
        target,
        bias=bias,
        eps=None,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        chunk_rows=chunk_rows,
    )


def linear_uce_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    eps: float = 1e-3,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Unlearning cross-entropy of a projection onto the vocabulary.

        z = h W' + b,   p = softmax(z)_t,   L = -log(1 - (1 - ε) p),
        ∂L/∂z_j = s (δ_jt - softmax(z)_j),  s = (1 - ε) p / (1 - (1 - ε) p)

    Bounded: 0 <= L <= -log ε and ‖∂L/∂z‖₁ <= 2. It is least at p = 0, where it stops pushing. ε
    trades the height of the bound against the speed of the start: the gradient of a token that the
    model knows by heart, 1 - p much smaller than ε, vanishes like (1 - p) / ε.

    Args:
        eps: 0 < ε < 1; less for a model that knows the answers by heart.

    Everything else is as in `linear_cross_entropy`.

    Source: arXiv 2412.20412, section III.A.
    """
    check_eps(eps)
    return _ce(
        hidden,
        weight,
        target,
        bias=bias,
        eps=eps,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        chunk_rows=chunk_rows,
    )


def linear_kl_div(
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
    chunk_rows: int | None = None,
) -> Tensor:
    """KL divergence of a model from its reference, both projected onto the vocabulary.

        z = h W' + b,  z_ref = h_ref W_ref' + b_ref,  p = softmax(z),  p_ref = softmax(z_ref)
        L = KL(p_ref ‖ p) = Σ_j p_ref_j (log p_ref_j - log p_j),   ∂L/∂z = p - p_ref

    Both logits are float32 even where the operands are shorter: of logits rounded to bfloat16 the
    difference p - p_ref keeps few digits. L is never negative. The reference is a constant: no
    gradient reaches ref_hidden, ref_weight or ref_bias, also where ref_weight is weight.

    Args:
        ref_hidden: [..., H_ref] of hidden's dtype, without a gradient.
        ref_weight: [V, H_ref]; None for weight itself.
        mask: [...], bool or integers: which rows count; None for all.
        bias, ref_bias: [V]; None for none.

    Everything else is as in `linear_cross_entropy`, the default of chunk_rows counting both logits.
    """
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias)
    reference = reference_head_of(head, ref_hidden, ref_weight, ref_bias)
    target = mask_target(mask, head)
    scale = scale_of(reduction, normalizer, target >= 0, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    losses, *gradients = _linear_kl(
        *head.detach().tensors, *reference.tensors, target, scale, wants, chunk_rows
    )
    if reduction == "none":
        joined: Tensor = _join_kl(losses, *head.tensors, *reference.tensors, target, chunk_rows)
        return joined.reshape(head.lead)
    loss: Tensor = _join_gradients(losses.sum() * scale, *head.tensors, *gradients)
    return loss


def linear_ce_kl(
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
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` and `linear_kl_div` of the same rows from one projection of hidden.

    The rows that count in both are those with a target. Each of the two losses has gradients of
    its own: backward through one, the other, in any order, or through their sum. 12 M H V
    operations where the two functions would take 14; logits are float32 for both losses.

    Returns:
        (cross-entropy, KL), each as its own function returns it.
    """
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias)
    reference = reference_head_of(head, ref_hidden, ref_weight, ref_bias)
    target = flat_target(target, head.lead, hidden.device)
    counted = target != ignore_index
    scale = scale_of(reduction, normalizer, counted, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    results = _linear_ce_kl(
        *head.detach().tensors, *reference.tensors, target, scale, ignore_index, wants, chunk_rows
    )
    ce, *ce_gradients = results[:4]
    kl, *kl_gradients = results[4:]
    if reduction == "none":
        ce = _join_ce(ce, *head.tensors, target, None, ignore_index, chunk_rows)
        mask = counted.long() - 1
        kl = _join_kl(kl, *head.tensors, *reference.tensors, mask, chunk_rows)
        return ce.reshape(head.lead), kl.reshape(head.lead)
    return (
        _join_gradients(ce.sum() * scale, *head.tensors, *ce_gradients),
        _join_gradients(kl.sum() * scale, *head.tensors, *kl_gradients),
    )
