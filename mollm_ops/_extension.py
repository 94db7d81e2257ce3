"""The compiled extension, and how Torch tensors are handed to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

try:
    extension: ModuleType | None = import_module("mollm_ops._C")
except ImportError:  # installed without a compiler: plain Torch serves every call
    extension = None

MAX_OBJECTIVES: int = extension.MAX_OBJECTIVES if extension is not None else 8

MAX_ROWS = 64  # lists at most on the CPU; csrc/gram.h, kMaxRows

# The order of csrc/gram.h, enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SIZES = (4, 8, 2, 2)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}, so mollm_ops falls back to plain Torch there.", stacklevel=4)


def has_kernels_for(device: torch.device) -> bool:
    """Whether the extension computes on `device`; says once where it could but was not built to."""
    if device.type == "cpu":
        if extension is None:
            _warn_once("mollm_ops was installed without its compiled extension")
        return extension is not None
    if device.type == "cuda":
        built = extension is not None and extension.HAS_CUDA
        if not built:
            _warn_once("mollm_ops was installed without its CUDA part (nvcc was not found)")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            _warn_once("the CUDA kernels of mollm_ops need compute capability 8.0")
            built = False
        return built
    return False


# ---- addresses: nothing else in mollm_ops takes one for the extension


def listed(
    name: str, tensors: Sequence[Tensor | None], counts: Sequence[int], device: torch.device
) -> tuple[list[int], list[int]]:
    """Addresses and dtypes, as the extension takes one or more lists of tensors; 0 for None.

    Every tensor must be contiguous, on a device of that kind, of a known dtype, and its memory must
    hold the `counts` of its list.
    """
    addresses, codes = [], []
    columns, on_cuda = len(counts), device.type == "cuda"
    for n, t in enumerate(tensors):
        if t is None:
            addresses.append(0)
            codes.append(0)
            continue
        code = DTYPE_CODES.get(t.dtype)
        if code is None or not t.is_contiguous() or t.is_cuda != on_cuda or t.is_neg():
            kind = "negated " if t.is_neg() else ""
            raise TypeError(
                f"{name}[{n}] must be contiguous and of a floating dtype on {device}, but got "
                f"{kind}{t.dtype} on {t.device} with strides {t.stride()}."
            )
        count = counts[n % columns]
        held = t.untyped_storage().nbytes() - t.storage_offset() * _SIZES[code]
        address = t.data_ptr() if count else 0
        if held < count * _SIZES[code] or (count and not address):
            raise ValueError(
                f"{name}[{n}] must hold {count} elements, but got memory of {max(held, 0)} bytes: "
                "it is smaller, fake, or its storage was freed."
            )
        addresses.append(address)
        codes.append(code)
    return addresses, codes


def memory(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Address and number of elements, as the extension takes memory of a fixed dtype."""
    if tensor.dtype != dtype or tensor.device.type != device.type or not tensor.is_contiguous():
        raise TypeError(
            f"{name} must be contiguous {dtype} on {device}, but got {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}."
        )
    offset = tensor.storage_offset() * tensor.element_size()
    if tensor.untyped_storage().nbytes() - offset < tensor.nbytes or not tensor.data_ptr():
        raise ValueError(f"{name} must have memory, but it is empty, fake, or was freed.")
    return tensor.data_ptr(), tensor.numel()


def address(name: str, tensor: Tensor) -> int:
    """Address of a tensor of any strides; 0 for one without elements."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < end or not tensor.data_ptr():
        raise ValueError(
            f"{name} must hold all of its elements, but its storage has {held} of {end} bytes: it "
            "is fake, or its storage was freed."
        )
    return tensor.data_ptr()
