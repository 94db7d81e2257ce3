"""The dtypes that models are held in and compute in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from mollm.errors import UsageError
from mollm.system.machine import cpu_flags, cpu_vendor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COMPUTE_DTYPES = ("auto", *DTYPES)
"""Names for `computing_in`."""

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls the instructions that multiply bfloat16: on x86, and on Arm."""
_ISAS_WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits on oneDNN under which it emulates bfloat16 without saying so."""

_asked: ContextVar[str] = ContextVar("compute_dtype", default="auto")


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype of matrix products, and why it is that one."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The dtype as settings spell it."""
        return str(self.dtype).removeprefix("torch.")


def compute_dtype(device: torch.device) -> ComputeDtype:
    """What a forward pass on `device` computes its matrix products in.

    bfloat16 where the device is faster in it, else float32: a processor that emulates bfloat16
    takes three times as long as in float32. `computing_in` overrules it.
    """
    asked = _asked.get()
    if asked != "auto":
        return ComputeDtype(DTYPES[asked], f"compute_dtype is {asked}")
    why_not = _no_bf16_on_cpu() if device.type == "cpu" else _no_bf16_on_gpu(device)
    if why_not is not None:
        return ComputeDtype(torch.float32, why_not)
    return ComputeDtype(torch.bfloat16, "the device is faster in it")


def autocast(device: torch.device) -> torch.autocast:
    """The context of a forward pass that computes as `compute_dtype` says."""
    enabled = compute_dtype(device).dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def computing_in(name: str) -> Iterator[None]:
    """Inside, `name` decides what forward passes compute in.

    Args:
        name: "bfloat16"; "float32", for products in the dtype of the weights; or "auto", which
            leaves the choice to the device, or to the block around.

    Raises:
        UsageError: It is none of these.
    """
    if name not in COMPUTE_DTYPES:
        raise UsageError(
            f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, but got {name!r}."
        )
    before = _asked.set(_asked.get() if name == "auto" else name)
    try:
        yield
    finally:
        _asked.reset(before)


def _no_bf16_on_cpu() -> str | None:
    found = _BF16_FLAGS & cpu_flags()
    if not found:
        return "the processor has no instructions for bfloat16"
    if found == {"avx512_bf16"} and cpu_vendor() == "GenuineIntel":
        # One unit multiplies bfloat16, where two multiply float32: what is won by the shorter
        # operands is lost, and casting comes on top. The demo took 1.2 times as long.
        return "an Intel processor without AMX computes as fast in float32"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if limit in _ISAS_WITHOUT_BF16 or supported is None or not supported():
        return f"oneDNN may not use bfloat16{f' (ONEDNN_MAX_CPU_ISA={limit})' if limit else ''}"
    return None


def _no_bf16_on_gpu(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return "the device has no instructions for bfloat16"
    return None
