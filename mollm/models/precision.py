"""The dtypes that models are held in and compute in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_in_own_dtype: ContextVar[bool] = ContextVar("in_own_dtype", default=False)
"""Whether `autocast` is off."""


def autocast(device: torch.device) -> torch.autocast:
    """bf16 for the matrix products of a forward pass where the device computes in it natively,
    unless `in_own_dtype`."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    enabled = native and not _in_own_dtype.get()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def in_own_dtype() -> Iterator[None]:
    """Inside, forward passes compute in the dtype of the weights."""
    before = _in_own_dtype.set(True)
    try:
        yield
    finally:
        _in_own_dtype.reset(before)


def _cpu_has_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported()) if supported is not None else False


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
