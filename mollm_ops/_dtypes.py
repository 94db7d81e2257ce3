"""Dtypes: their names, and the ones that losses are computed in."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses of inputs of `dtype` are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients are kept in until the factor from upstream is known.

    Of a mean over tokens most of them are too small for float16, and a loss scale that makes up for
    it only comes in backward.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
