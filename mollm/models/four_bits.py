"""Matrices in 4 bits, as QLoRA has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NF4 = "nf4"
"""A quantization: 4 bits for each weight, at the quantiles of a normal distribution."""


def in_four_bits(weight: Tensor) -> bool:
    """Whether it is one of bitsandbytes' matrices."""
    return hasattr(weight, "quant_state")


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Of the matrices in 4 bits by name, on the CPU: what they compute with."""
    from bitsandbytes.functional import dequantize_4bit

    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return {
        name: dequantize_4bit(p.data, p.quant_state).cpu() for name, p in named if in_four_bits(p)
    }
