"""Gradients of the row kernels' losses at some columns of every row.

Of a whole row z three numbers are kept, in the notation of `mollm_ops.rows`:

    m = max z,   S = Σ_{j≠t} exp(z_j - m),   e_t

With them its columns a … b are enough for their gradients, and the digits are those of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mollm_ops._dtypes import wide_dtype
from mollm_ops.operands import LogitTransform
from mollm_ops.rows import transformed

_BLOCK_ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 18}
"""Of exponentials that are held at a time."""


def row_sums(logits: Tensor, target: Tensor, transform: LogitTransform) -> Tensor:
    """m, S and e_t of every row, wide, [R, 3].

    Args:
        logits: [R, V], what a head returns.
        target: [R] int64; of rows that do not count any number.
        transform: From the head's outputs to logits.
    """
    wide, (rows, vocab) = wide_dtype(logits.dtype), logits.shape
    at = target.clamp(0, vocab - 1)[:, None]
    m, _ = transformed(logits.amax(1, keepdim=True).to(wide), transform)  # it is monotonic
    z_t, _ = transformed(logits.gather(1, at).to(wide), transform)
    S = torch.zeros_like(m)
    elements = _BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS["cuda"])
    width = max(1, elements // max(1, rows))
    for begin in range(0, vocab, width):
        z, _ = transformed(logits[:, begin : begin + width].to(wide), transform)
        e = z.sub(m).exp_()
        S += _with(e, at - begin, torch.zeros_like(m)).sum(1, keepdim=True)
    return torch.cat([m, S, (z_t - m).exp_()], 1)


def _with(rows: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """The same rows with a value [R, 1] at a column [R, 1] of each, where there is that column."""
    inside = (at >= 0) & (at < rows.shape[1])
    at = at.clamp(0, rows.shape[1] - 1)
    return rows.scatter_(1, at, torch.where(inside, value, rows.gather(1, at)))


@dataclass(frozen=True)
class RowSlice:
    """Some columns of every row."""

    p: Tensor
    """softmax(z), [R, b - a], wide."""
    slope: Tensor | float
    """∂z/∂z₀."""
    sums: Tensor
    """Of the whole rows, see `row_sums`."""

    @classmethod
    def of(cls, logits: Tensor, sums: Tensor, transform: LogitTransform) -> RowSlice:
        """From the head's outputs at these columns, [R, b - a]."""
        z, slope = transformed(logits.to(sums.dtype), transform)
        m, S, e_t = sums[:, :1], sums[:, 1:2], sums[:, 2:]
        return cls(z.sub_(m).exp_().div_(S + e_t), slope, sums)

    def log_loss(self, target: Tensor, eps: float | None) -> Tensor:
        """∂L/∂z of cross-entropy, or of UCE where eps is given; takes the place of `p`.

        Args:
            target: [R], as a column of the slice; outside of it where it is another one.
            eps: As of `uce_loss`.
        """
        S, e_t = self.sums[:, 1:2], self.sums[:, 2:]
        gradient = _with(self.p, target[:, None], -S / (S + e_t))
        if eps is None:
            return gradient
        return gradient.mul_(-(1 - eps) * e_t / (S + eps * e_t))
