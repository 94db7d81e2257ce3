"""Weights as a served file holds them: in 8 or 4 bits."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mollm.audit.relearning import put_back
from mollm.models.forward import linears_before_head
from mollm.models.four_bits import NF4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 32
"""Weights of a row that share a scale, in GGUF's simple formats."""

FORMATS = {
    "Q8_0": "8 bits, as GGUF's Q8_0",
    "Q4_0": "4 bits, as GGUF's Q4_0",
    NF4: "4 bits, as bitsandbytes' NF4",
}
"""Formats that weights are rounded to, in words."""


def obstacle(model: PreTrainedModel, name: str) -> str | None:
    """Why the model's weights cannot be rounded to a format; None where they can."""
    package = "bitsandbytes" if name == NF4 else "gguf"
    if importlib.util.find_spec(package) is None:
        return f"it needs the package {package}, which is not installed"
    if not any(True for _ in _matrices(model, name)):
        return f"no linear layer has rows of a multiple of {_BLOCK} weights"
    return None


@contextlib.contextmanager
def rounded(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the matrices of the layers hold what a file in that format would give back.

    Embeddings, head, norms and biases stay as they are, and so does a matrix whose rows GGUF cannot
    divide into blocks.

    Args:
        model: What is rounded; afterwards it is as it was, bit for bit.
        name: One of FORMATS.
    """
    with put_back(model), torch.no_grad():
        for weight in _matrices(model, name):
            weight.data.copy_(_through(weight, name))
        yield


def _matrices(model: PreTrainedModel, name: str) -> Iterator[Tensor]:
    for layer in linears_before_head(model):
        if name == NF4 or layer.weight.shape[1] % _BLOCK == 0:
            yield layer.weight


def _through(weight: Tensor, name: str) -> Tensor:
    if name == NF4:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight.detach().contiguous(), quant_type=NF4)
        back: Tensor = dequantize_4bit(packed, state)
        return back
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    array = weight.detach().float().cpu().numpy()
    return torch.from_numpy(quants.dequantize(quants.quantize(array, kind), kind))
