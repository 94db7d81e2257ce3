"""Matrices in 4 bits, as QLoRA has them."""

from __future__ import annotations

import copy
import math
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
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return {name: _dequantized(p) for name, p in named if in_four_bits(p)}


def _dequantized(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    # In one row: on a CPU it gives rows that are no multiple of a block another block's scale.
    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, (math.prod(state.shape),)
    flat: Tensor = dequantize_4bit(weight.data, state)
    return flat.reshape(shape).cpu()
