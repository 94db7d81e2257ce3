"""Checks and shapes of the losses' arguments: everything that is said before a kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from mollm_ops._checks import check_dtype, check_tensor
from mollm_ops._dtypes import name_of, wide_dtype
from mollm_ops.operands import LogitTransform


@dataclass(frozen=True)
class Head:
    """A projection onto the vocabulary, flattened to rows: z₀ = hidden weight' + bias, and z."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    lead: torch.Size
    """The shape that `hidden` came with, without H."""
    transform: LogitTransform

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.weight.detach(), bias, self.lead, self.transform)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
        """As the registered ops take a head."""
        return *self.tensors, self.transform.scale, self.transform.softcap

    def wants(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias need a gradient."""
        enabled = torch.is_grad_enabled()
        needs_bias = self.bias is not None and self.bias.requires_grad
        return (
            enabled and self.hidden.requires_grad,
            enabled and self.weight.requires_grad,
            enabled and needs_bias,
        )


def head_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    prefix: str = "",
) -> Head:
    """Checks the three and flattens hidden; under autocast all take on the autocast dtype."""
    names = (f"{prefix}hidden", f"{prefix}weight" if prefix else "weight", f"{prefix}bias")
    check_tensor(names[0], hidden)
    check_tensor(names[1], weight)
    if bias is not None:
        check_tensor(names[2], bias)
    device = hidden.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)  # of which meta has none
    if casts and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_dtype(names[0], hidden)
    check_transforms(hidden, weight, bias)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{names[1]} must be [V, H] with V >= 1, but got {_shape(weight)}.")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} must be [..., {weight.shape[1]}] to fit {names[1]} {_shape(weight)}, "
            f"but got {_shape(hidden)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must be [{weight.shape[0]}], but got {_shape(bias)}.")
    for name, tensor in zip(names[1:], (weight, bias), strict=True):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have {names[0]}'s dtype {name_of(hidden.dtype)}, but got "
                f"{name_of(tensor.dtype)}; convert one of them or use autocast."
            )
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, but got {tensor.device}.")
    lead = hidden.shape[:-1]
    return Head(hidden.reshape(lead.numel(), hidden.shape[-1]), weight, bias, lead, transform)


def reference_head_of(
    head: Head,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logit_scale: float | None,
    ref_softcap: float | None,
) -> Head:
    """The reference's projection, a constant; scale and cap are the head's where they are None."""
    own = head.transform
    transform = LogitTransform(
        own.scale if ref_logit_scale is None else ref_logit_scale,
        own.softcap if ref_softcap is None else ref_softcap,
    )
    check_tensor("ref_hidden", ref_hidden)
    if ref_hidden.requires_grad:
        raise ValueError(
            "ref_hidden must be a constant, but it requires a gradient; compute it under "
            "torch.no_grad() or detach it."
        )
    weight = head.weight if ref_weight is None else ref_weight
    reference = head_of(ref_hidden, weight, ref_bias, transform, prefix="ref_").detach()
    if reference.lead != head.lead:
        raise ValueError(
            f"ref_hidden must have hidden's leading shape {tuple(head.lead)}, but got "
            f"{tuple(reference.lead)}."
        )
    if reference.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"ref_weight must have weight's vocabulary {head.weight.shape[0]}, but got "
            f"{reference.weight.shape[0]}."
        )
    if reference.hidden.dtype != head.hidden.dtype:
        raise TypeError(
            f"ref_hidden must have hidden's dtype {name_of(head.hidden.dtype)}, but got "
            f"{name_of(reference.hidden.dtype)}."
        )
    return reference


def flat_target(target: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """target as int64 [N]."""
    check_tensor("target", target)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integers, but got {name_of(target.dtype)}.")
    if target.shape != lead:
        raise ValueError(f"target must be {tuple(lead)} like the rows, but got {_shape(target)}.")
    if target.device != device:
        raise ValueError(f"target must be on {device}, but got {target.device}.")
    return target.reshape(-1).long()


def mask_target(mask: Tensor | None, head: Head) -> Tensor:
    """A mask as targets: 0 where a row counts, -1 where not, int64 [N]."""
    if mask is None:
        return torch.zeros(len(head.hidden), dtype=torch.int64, device=head.hidden.device)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool and (mask.is_floating_point() or mask.is_complex()):
        raise TypeError(f"mask must be bool or integers, but got {name_of(mask.dtype)}.")
    if mask.shape != head.lead:
        raise ValueError(f"mask must be {tuple(head.lead)} like the rows, but got {_shape(mask)}.")
    if mask.device != head.hidden.device:
        raise ValueError(f"mask must be on {head.hidden.device}, but got {mask.device}.")
    return mask.reshape(-1).ne(0).long() - 1


def check_flat(
    head: Head, reference: Head | None, target: Tensor, scale: Tensor, chunk_rows: int | None
) -> None:
    """All that the registered ops rely on, whoever calls them: shapes, dtypes and devices."""
    hidden, weight = head.hidden, head.weight
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"hidden and weight must be [N, H] and [V, H], but got {_shape(hidden)} and "
            f"{_shape(weight)}."
        )
    check_dtype("hidden", hidden)
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("weight", weight, (vocab, hidden.shape[1]), dtype),
        ("bias", head.bias, (vocab,), dtype),
        ("target", target, (rows,), torch.int64),
        ("scale", scale, (rows,) if scale.ndim else (), wide_dtype(dtype)),
    ]
    if reference is not None:
        width = reference.hidden.shape[-1] if reference.hidden.ndim else 0
        wanted += [
            ("ref_hidden", reference.hidden, (rows, width), dtype),
            ("ref_weight", reference.weight, (vocab, width), dtype),
            ("ref_bias", reference.bias, (vocab,), dtype),
        ]
    for name, tensor, shape, kind in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, but got {_shape(tensor)}.")
        if tensor.dtype != kind:
            raise TypeError(f"{name} must be {name_of(kind)}, but got {name_of(tensor.dtype)}.")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, but got {tensor.device}.")
    check_chunk_rows(chunk_rows)


def check_transforms(*tensors: Tensor | None) -> None:
    """Refuses torch.func.grad, jvp and forward-mode duals: their derivatives would be zero."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and _is_differentiated(tensor):
            raise RuntimeError(
                "mollm_ops losses must be differentiated with backward() or torch.autograd.grad, "
                "but got a tensor of torch.func.grad, torch.func.jvp or forward-mode AD; use the "
                "functions of mollm_ops.reference there."
            )


def _is_differentiated(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return dual.tangent is not None


def check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"eps must be between 0 and 1, both excluded, but got {eps}.")
    smallest = torch.finfo(torch.float32).smallest_normal
    if eps < smallest:
        raise ValueError(
            f"eps must be at least {smallest:.2g}, the smallest normal number of float32, but got "
            f"{eps}."
        )


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, but got {chunk_rows}.")


def check_reduction(reduction: str, normalizer: float | Tensor | None = None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", but got {reduction!r}.')
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'normalizer must be None unless reduction is "mean", but got reduction {reduction!r}.'
        )
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, but got {_shape(normalizer)}.")
        if normalizer.requires_grad:
            raise ValueError("normalizer must be a constant, but it requires a gradient.")
    elif not (normalizer > 0 and math.isfinite(normalizer)):
        raise ValueError(f"normalizer must be a positive number, but got {normalizer}.")


def scale_of(
    reduction: str, normalizer: float | Tensor | None, counted: Tensor, dtype: torch.dtype
) -> Tensor:
    """What the sum of the rows' losses is multiplied by, a wide scalar on their device."""
    wide = wide_dtype(dtype)
    if reduction != "mean":
        return torch.ones((), dtype=wide, device=counted.device)
    if normalizer is None:
        return counted.sum().clamp(min=1).to(wide).reciprocal()
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().reshape(()).to(wide)
        if divisor.device.type != "cpu":  # a scalar on the host goes into the kernel as it is
            divisor = divisor.to(counted.device)
        # A batch without an answer token has normalizer 0 and loss 0: 0 / tiny is 0, 0 / 0 is not.
        one = torch.ones((), dtype=wide, device=counted.device)
        return one / divisor.clamp(min=torch.finfo(wide).tiny)
    return torch.full((), 1 / normalizer, dtype=wide, device=counted.device)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
