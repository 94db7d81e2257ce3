"""Checks of arguments that several ops share. Each error is one sentence with the value in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mollm_ops._dtypes import name_of
from mollm_ops._extension import DTYPE_CODES

GradientLists = Sequence[Sequence[Tensor | None]]


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_CODES:
        known = ", ".join(name_of(d) for d in DTYPE_CODES)
        raise TypeError(f"{name} must be one of {known}, but got {name_of(tensor.dtype)}.")


def check_gradients(gradients: GradientLists) -> None:
    """K lists of the same tensors' gradients: same lengths, shapes and device, supported dtypes."""
    if len(gradients) == 0:
        raise ValueError("gradients must hold at least one list, but got none.")
    length = len(gradients[0])
    for k, tensors in enumerate(gradients):
        if len(tensors) != length:
            raise ValueError(
                f"gradients[{k}] must have as many tensors as gradients[0] ({length}), "
                f"but got {len(tensors)}; put None where an objective has no gradient."
            )
    if all(t is None for tensors in gradients for t in tensors):
        raise ValueError("gradients must hold at least one tensor, but every entry is None.")
    first: list[tuple[int, Tensor] | None] = [None] * length
    device: torch.device | None = None
    for k, tensors in enumerate(gradients):
        for n, tensor in enumerate(tensors):
            if tensor is None:
                continue
            name = f"gradients[{k}][{n}]"
            if tensor.layout != torch.strided:
                raise TypeError(f"{name} must be dense, but got layout {tensor.layout}.")
            check_dtype(name, tensor)
            device = tensor.device if device is None else device
            if tensor.device != device:
                raise ValueError(f"{name} must be on {device}, but got {tensor.device}.")
            known = first[n]
            if known is None:
                first[n] = (k, tensor)
            elif tensor.shape != known[1].shape:
                raise ValueError(
                    f"{name} must have the shape of gradients[{known[0]}][{n}], "
                    f"{tuple(known[1].shape)}, but got {tuple(tensor.shape)}."
                )


def check_means(gradients: GradientLists, means: GradientLists) -> None:
    """Running means that match the gradients: one wherever there is a gradient, contiguous."""
    check_gradients([*gradients, *means])
    for k, (tensors, row) in enumerate(zip(gradients, means, strict=True)):
        for n, (t, mean) in enumerate(zip(tensors, row, strict=True)):
            if t is not None and (mean is None or not mean.is_contiguous()):
                got = "None" if mean is None else "one that is not"
                raise ValueError(f"means[{k}][{n}] must be a contiguous tensor, but got {got}.")
