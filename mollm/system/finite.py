"""Whether a tensor holds neither NaN nor infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: whole numbers are, and an empty tensor is.

    In one pass without a tensor of truths, so several times as fast as `tensor.isfinite().all()`:
    NaN is both the least and the greatest element of a tensor that holds it. Of a DTensor, give the
    local part.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # of which Torch knows no order
        tensor = tensor.float()
    least, greatest = tensor.detach().aminmax()
    return bool(least.isfinite() & greatest.isfinite())
