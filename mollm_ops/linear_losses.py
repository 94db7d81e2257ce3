"""Losses of a projection onto the vocabulary that never hold the logits of all tokens at once.

Tokens are worked on in chunks: one GEMM for the chunk's logits, one row kernel that turns them into
losses and, in place, gradients, two GEMMs for the gradients of hidden and weight. The gradients of
a mean or a sum are ready when the forward pass ends, 6 M H V operations in all (KL: 8); backward
scales them. Losses that are not reduced learn their tokens' upstream gradients only in backward
and project once more there.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mollm_ops import _linear_ops as ops
from mollm_ops._chunks import Loss
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
from mollm_ops.deferred import DeferredWeight, deferred
from mollm_ops.operands import LogitTransform
from mollm_ops.rows import row_targets


def _forward_wants(reduction: str, head: Head) -> tuple[bool, bool, bool]:
    """Gradients to compute in the forward pass: none where upstream gradients differ by token."""
    return (False, False, False) if reduction == "none" else head.wants()


def _ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    transform: LogitTransform,
    eps: float | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    chunk_rows: int | None,
) -> Tensor:
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias, transform)
    later = deferred(weight, head)
    head = head if later is None else replace(head, weight=head.weight.detach())
    target = flat_target(target, head.lead, hidden.device)
    scale = scale_of(reduction, normalizer, target != ignore_index, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    if later is None:
        losses, *gradients = ops.linear_ce(
            *head.detach().operands,
            target,
            scale,
            eps,
            ignore_index,
            False,
            list(wants),
            chunk_rows,
        )
    else:
        rows = row_targets(target, len(weight), ignore_index)
        losses, *gradients = later.compute(
            head, None, None, rows, Loss(scale, wants), None, eps, chunk_rows
        )
    if reduction == "none":
        joined: Tensor = ops.join_ce(
            losses, *head.operands, target, eps, ignore_index, False, chunk_rows
        )
        return _watched(later, joined, scale).reshape(head.lead)
    loss: Tensor = ops.join_gradients(losses.sum() * scale, *head.tensors, *gradients)
    return _watched(later, loss, scale)


def _watched(
    later: DeferredWeight | None, loss: Tensor, scale: Tensor, *, kl: bool = False
) -> Tensor:
    return loss if later is None else later.watched(loss, scale, kl=kl)


def linear_cross_entropy(
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
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of a projection onto the vocabulary, without the logits of all tokens.

        z = h W' + b,   L = -log softmax(z)_t,   ∂L/∂z_j = softmax(z)_j - δ_jt

    Of a model that scales or caps what its head returns, z is s (h W' + b) or, with a cap c,
    c tanh(s (h W' + b) / c).

    What the head returns is rounded to the inputs' dtype, as a linear layer's output is; everything
    between it and the gradients is float32, and dW is added up over chunks in float32 (float64
    throughout for float64 inputs). A frozen weight costs no GEMM and no memory. Rows with target
    ignore_index count neither in the loss nor in its mean; on the CPU they cost no GEMM either, a
    GPU does not tell the host how many they are without a synchronisation. The op traces into a
    compiled graph in one piece.

    Args:
        hidden: [..., H], float32, float64, bfloat16 or float16; under autocast the autocast dtype.
        weight: [V, H], the head, of hidden's dtype.
        target: [...] integers in [0, V), or ignore_index.
        bias: [V] of hidden's dtype.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for a
            loss per row, 0 where ignored. "none" projects once more in backward.
        normalizer: what "mean" divides by instead, for instance the number of answer tokens in all
            micro-batches of a step. A number, or a tensor of one element on any device.
        logit_scale, softcap: s and c, positive; None for no cap.
        chunk_rows: rows of logits to hold at a time; the default keeps them near 1 GiB on a GPU
            and 256 MiB on a CPU.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes that do not fit, options out of range, or a target outside [0, V). A GPU
            cannot say the last without a synchronisation: there the loss is NaN and the row's
            gradient zero.
        TypeError: another dtype, or dtypes that differ.
        RuntimeError: backward with create_graph=True, for the second derivative is not implemented;
            torch.func.grad and jvp.

    Example:
        >>> import torch
        >>> hidden, head = torch.eye(2, 4), torch.ones(6, 4)
        >>> target = torch.tensor([5, -100])  # the second row does not count
        >>> round(linear_cross_entropy(hidden, head, target).item(), 4)  # log 6
        1.7918
    """
    return _ce(
        hidden,
        weight,
        target,
        bias=bias,
        transform=LogitTransform(logit_scale, softcap),
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Unlearning cross-entropy of a projection onto the vocabulary.

        z = h W' + b,   p = softmax(z)_t,   L = -log(1 - (1 - ε) p),
        ∂L/∂z_j = s (δ_jt - softmax(z)_j),  s = (1 - ε) p / (1 - (1 - ε) p)

    Bounded: 0 <= L <= -log ε and ‖∂L/∂z‖₁ <= 2. It is least at p = 0, where it stops pushing. ε
    trades the height of the bound against the speed of the start: the gradient of a token that the
    model knows by heart, 1 - p much smaller than ε, vanishes like (1 - p) / ε.

    Args:
        eps: 1.2e-38 <= ε < 1; less for a model that knows the answers by heart.

    Everything else is as in `linear_cross_entropy`.

    Source: arXiv 2412.20412, section III.A.

    Example:
        >>> import torch
        >>> hidden, head = torch.eye(2, 4), 20 * torch.eye(6, 4)
        >>> known = linear_uce_loss(hidden, head, torch.tensor([0, 1]))
        >>> forgotten = linear_uce_loss(hidden, head, torch.tensor([2, 2]))
        >>> round(known.item(), 3), round(forgotten.item(), 3)  # between 0 and -log 1e-3
        (6.908, 0.0)
    """
    check_eps(eps)
    return _ce(
        hidden,
        weight,
        target,
        bias=bias,
        transform=LogitTransform(logit_scale, softcap),
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
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
        ref_logit_scale, ref_softcap: s and c of the reference; None for the model's own, a cap of
            infinity for none where the model has one.

    Everything else is as in `linear_cross_entropy`, the default of chunk_rows counting both logits.

    Example:
        >>> import torch
        >>> hidden, head = torch.eye(2, 4), torch.eye(6, 4)
        >>> linear_kl_div(hidden, head, ref_hidden=hidden).item()  # a model and itself
        0.0
        >>> linear_kl_div(hidden, head, ref_hidden=2 * hidden).item() > 0
        True
    """
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias, LogitTransform(logit_scale, softcap))
    reference = reference_head_of(
        head, ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap
    )
    later = deferred(weight, head, ref_weight)
    head = head if later is None else replace(head, weight=head.weight.detach())
    target = mask_target(mask, head)
    scale = scale_of(reduction, normalizer, target >= 0, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    if later is None:
        losses, *gradients = ops.linear_kl(
            *head.detach().operands, *reference.operands, target, scale, list(wants), chunk_rows
        )
    else:
        kl = Loss(scale, wants)
        losses, *gradients = later.compute(
            head, reference, ref_weight, target, None, kl, None, chunk_rows
        )
    if reduction == "none":
        joined: Tensor = ops.join_kl(
            losses, *head.operands, *reference.operands, target, chunk_rows
        )
        return _watched(later, joined, scale, kl=True).reshape(head.lead)
    loss: Tensor = ops.join_gradients(losses.sum() * scale, *head.tensors, *gradients)
    return _watched(later, loss, scale, kl=True)


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` and `linear_kl_div` of the same rows from one projection of hidden.

    The rows that count in both are those with a target. Each of the two losses has gradients of
    its own: backward through one, the other, in any order, or through their sum. 12 M H V
    operations where the two functions would take 14; logits are float32 for both losses.

    Returns:
        (cross-entropy, KL), each as its own function returns it.

    Example:
        >>> import torch
        >>> hidden = torch.eye(2, 4, requires_grad=True)
        >>> head, target = torch.eye(6, 4), torch.tensor([0, 1])
        >>> ce, kl = linear_ce_kl(hidden, head, target, ref_hidden=hidden.detach())
        >>> round(ce.item(), 4), kl.item()
        (1.0436, 0.0)
        >>> kl.backward()  # each loss has a backward of its own
        >>> ce.backward()
    """
    check_reduction(reduction, normalizer)
    check_chunk_rows(chunk_rows)
    head = head_of(hidden, weight, bias, LogitTransform(logit_scale, softcap))
    reference = reference_head_of(
        head, ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap
    )
    later = deferred(weight, head, ref_weight)
    head = head if later is None else replace(head, weight=head.weight.detach())
    target = flat_target(target, head.lead, hidden.device)
    counted = target != ignore_index
    scale = scale_of(reduction, normalizer, counted, head.hidden.dtype)
    wants = _forward_wants(reduction, head)
    if later is None:
        results = ops.linear_ce_kl(
            *head.detach().operands,
            *reference.operands,
            target,
            scale,
            ignore_index,
            list(wants),
            chunk_rows,
        )
    else:
        rows, each = row_targets(target, len(weight), ignore_index), Loss(scale, wants)
        results = later.compute(head, reference, ref_weight, rows, each, each, None, chunk_rows)
    ce, *ce_gradients = results[:4]
    kl, *kl_gradients = results[4:]
    if reduction == "none":
        ce = ops.join_ce(ce, *head.operands, target, None, ignore_index, True, chunk_rows)
        mask = counted.long() - 1
        kl = ops.join_kl(kl, *head.operands, *reference.operands, mask, chunk_rows)
    else:
        ce = ops.join_gradients(ce.sum() * scale, *head.tensors, *ce_gradients)
        kl = ops.join_gradients(kl.sum() * scale, *head.tensors, *kl_gradients)
    ce, kl = _watched(later, ce, scale), _watched(later, kl, scale, kl=True)
    return (ce.reshape(head.lead), kl.reshape(head.lead)) if reduction == "none" else (ce, kl)
