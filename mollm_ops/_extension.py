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

# The order of csrc/gram.h, enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


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


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def listed(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    """Addresses and dtypes, as the extension takes a list of tensors."""
    return addresses(tensors), dtype_codes(tensors)


def dtype_codes(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else DTYPE_CODES[t.dtype] for t in tensors]
