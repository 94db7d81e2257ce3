"""The GEMMs of the linear losses, a chunk of rows at a time, around the row kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mollm_ops._dtypes import gradient_dtype, wide_dtype
from mollm_ops._loss_arguments import Head
from mollm_ops.operands import RowLoss
from mollm_ops.row_slices import row_sums
from mollm_ops.rows import kl_rows, log_rows

WORKSPACE_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
"""What the logits of one chunk may take, all projections of a loss together."""

MIN_CHUNK_ROWS = {"cuda": 2048, "cpu": 256}
"""Rows below which the GEMMs lose more speed than the smaller workspace is worth."""

_UPCAST_BYTES = 32 << 20
"""Of 16-bit operands that the CPU, whose GEMMs round to 16 bits, holds in float32 at a time."""


class Gradients(NamedTuple):
    """Of one loss with respect to hidden, weight and bias; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Loss:
    """One loss to compute for every row: [N] wide scales in, [N] wide losses out."""

    scale: Tensor
    wants: tuple[bool, bool, bool]


class Kept:
    """Of the rows that count, what it takes to find some columns of their gradients later."""

    index: Tensor | None
    """Which rows they are, None for all."""
    hidden: Tensor
    ref_hidden: Tensor | None
    target: Tensor
    sums: Tensor
    """Of their logits, see `mollm_ops.row_slices.row_sums`."""
    ref_sums: Tensor


@dataclass(frozen=True)
class RowScales:
    """What the row kernels multiply gradients by, and what is left to multiply the GEMMs' by.

    Elements of ∂L/∂z are at most 1, those of a likely loss near 1 / V, and the scale of a mean is
    1 / N: of float16 the product has few digits or none. There rows are multiplied by 2^15 over the
    largest scale, and the GEMMs' results, which are float32, by the inverse.
    """

    rows: Tensor
    """[N], any stride."""
    rest: Tensor | None
    """A scalar, None for 1."""

    @classmethod
    def of(cls, scale: Tensor, logit_scale: float, dtype: torch.dtype) -> RowScales:
        """For scales [N], and gradients that the kernels write in `dtype`."""
        if dtype != torch.float16 or scale.numel() == 0:
            return cls(scale, None)
        rest = scale.abs().amax() * (logit_scale / 2**15)
        return cls(scale / torch.where(rest > 0, rest, 1), rest)


def chunk_rows_for(
    head: Head, projections: int, rows: int, chunk_rows: int | None, logits: torch.dtype
) -> int:
    """How many rows to work on at a time: the largest equal chunks within the workspace."""
    if chunk_rows is None:
        kind = head.hidden.device.type if head.hidden.device.type in WORKSPACE_BYTES else "cuda"
        size = logits.itemsize * projections * head.weight.shape[0]
        chunk_rows = max(WORKSPACE_BYTES[kind] // size, MIN_CHUNK_ROWS[kind])
        chunk_rows = -(-rows // max(1, -(-rows // chunk_rows)))
    return max(1, min(chunk_rows, rows))


def project_rows(head: Head, hidden: Tensor, out: Tensor) -> None:
    """out = hidden weight' + bias; `out` may be wider than the operands, which stay as they are."""
    if out.dtype == hidden.dtype:
        if head.bias is None:
            torch.mm(hidden, head.weight.t(), out=out)
        else:
            torch.addmm(head.bias, hidden, head.weight.t(), out=out)
        return
    if hidden.device.type == "cuda":
        torch.mm(hidden, head.weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        width = _block_rows(hidden.shape[1], out.dtype)
        for begin in range(0, out.shape[1], width):
            block = head.weight[begin : begin + width].to(out.dtype)
            torch.mm(wide, block.t(), out=out[:, begin : begin + width])
    if head.bias is not None:
        out.add_(head.bias)


def _block_rows(width: int, dtype: torch.dtype) -> int:
    return max(1, _UPCAST_BYTES // (dtype.itemsize * max(1, width)))


class GradientSums:
    """Adds up the gradients of one loss over chunks.

    dW of 16-bit operands is added up in float32 and rounded once, at the end; one chunk needs no
    addition and no buffer beside the result. Of float16 all results stay float32, see
    `gradient_dtype`. A GPU's GEMM adds 16-bit products up in float32; the CPU's rounds its result,
    so there what is to be float32 is multiplied in float32, a block at a time.
    """

    def __init__(
        self,
        head: Head,
        wants: tuple[bool, bool, bool],
        rows: int,
        chunks: int,
        rest: Tensor | None,
    ) -> None:
        self.head = head
        self.rest = rest
        """What the sums are to be multiplied by at the end, None for 1."""
        wide = wide_dtype(head.hidden.dtype)
        self.dtype = gradient_dtype(head.hidden.dtype)
        shape = rows, head.hidden.shape[1]
        self.hidden = head.hidden.new_empty(shape, dtype=self.dtype) if wants[0] else None
        dtype = self.dtype if chunks == 1 else wide
        self.weight = torch.empty_like(head.weight, dtype=dtype) if wants[1] else None
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=wide) if wants[2] else None
        self.started = False

    def add(self, gradient: Tensor, hidden: Tensor, begin: int) -> None:
        """gradient [R, V] of the logits of rows begin ... begin + R, hidden [R, H]."""
        if self.hidden is not None:
            _multiply(gradient, self.head.weight, out=self.hidden[begin : begin + len(hidden)])
        if self.weight is not None:
            self._add_weight(self.weight, gradient.t(), hidden)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        self.started = True

    def _add_weight(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        if total.dtype == hidden.dtype:
            if self.started:
                torch.addmm(total, gradient, hidden, out=total)
            else:
                torch.mm(gradient, hidden, out=total)
        elif hidden.device.type == "cuda":
            if self.started:
                torch.addmm(total, gradient, hidden, out_dtype=total.dtype, out=total)
            else:
                torch.mm(gradient, hidden, out_dtype=total.dtype, out=total)
        else:
            wide = hidden.to(total.dtype)
            height = _block_rows(len(hidden), total.dtype)
            for begin in range(0, len(total), height):
                block = gradient[begin : begin + height].to(total.dtype)
                total[begin : begin + height].addmm_(block, wide, beta=int(self.started))

    def finish(self, index: Tensor | None) -> Gradients:
        """The sums in the dtype of the inputs, let go of here; rows outside `index` have zero."""
        head, none = self.head, self.head.hidden.new_empty
        hidden = self.hidden
        if hidden is not None and index is not None:
            zeros = torch.zeros_like(head.hidden, dtype=self.dtype)
            hidden = zeros.index_copy_(0, index, hidden)
        weight, self.weight = self.weight, None
        if weight is not None and not self.started:
            weight.zero_()
        bias = self.bias
        if self.rest is not None:
            for total in (hidden, weight, bias):
                if total is not None:
                    total.mul_(self.rest)
        weight = None if weight is None else weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        return Gradients(
            none(0) if hidden is None else hidden,
            none(0) if weight is None else weight,
            none(0) if bias is None else bias,
        )


def _multiply(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = gradient weight, [R, V] by [V, H]; `out` may be wider than the operands."""
    if out.dtype == gradient.dtype:
        torch.mm(gradient, weight, out=out)
    elif gradient.device.type == "cuda":
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        height = _block_rows(weight.shape[1] + len(gradient), out.dtype)
        for begin in range(0, len(weight), height):
            block = gradient[:, begin : begin + height].to(out.dtype)
            wide = weight[begin : begin + height].to(out.dtype)
            out.addmm_(block, wide, beta=int(begin > 0))


def counted_index(target: Tensor) -> Tensor | None:
    """The rows that count, None for all. Only where the host may look at the data."""
    if target.device.type != "cpu" or bool((target >= 0).all()):
        return None
    return (target >= 0).nonzero()[:, 0]


def losses_in_chunks(
    head: Head,
    reference: Head | None,
    target: Tensor,  # [N], as `mollm_ops.rows` takes it
    ce: Loss | None,
    kl: Loss | None,
    eps: float | None,
    chunk_rows: int | None,
    *,
    wide_logits: bool,
    kept: Kept | None = None,
) -> tuple[list[Tensor], list[Gradients]]:
    """Losses [N] and gradients of ce and kl, those that are given, in this order; `kept` is filled.

    Gradients are of `gradient_dtype`. With `wide_logits` the head's outputs are not rounded to 16
    bits: a KL, the difference of two projections, needs that.
    """
    head, reference = head.detach(), None if reference is None else reference.detach()
    index = counted_index(target)
    hidden, ref_hidden = head.hidden, None if reference is None else reference.hidden
    if index is not None:
        hidden, target = hidden[index], target[index]
        ref_hidden = None if ref_hidden is None else ref_hidden[index]
    asked = [loss for loss in (ce, kl) if loss is not None]
    wanted = [loss.scale.expand(len(head.hidden)) for loss in asked]
    if index is not None:
        wanted = [scale[index] for scale in wanted]
    scales = [RowScales.of(scale, head.transform.scale, hidden.dtype) for scale in wanted]

    rows, projections = len(hidden), 1 if reference is None else 2
    dtype = wide_dtype(hidden.dtype) if wide_logits else hidden.dtype
    size = chunk_rows_for(head, projections, rows, chunk_rows, dtype)
    buffers = [hidden.new_empty(size, len(head.weight), dtype=dtype) for _ in range(projections)]
    chunks = -(-rows // size)
    sums = [
        GradientSums(head, loss.wants, rows, chunks, scale.rest)
        for loss, scale in zip(asked, scales, strict=True)
    ]
    losses = [torch.empty(rows, dtype=s.dtype, device=s.device) for s in wanted]
    row, ref_row = [scales[0].rows.new_empty(0, 3)], [scales[0].rows.new_empty(0, 3)]
    for begin in range(0, rows, size):
        part = slice(begin, begin + size)
        h, t = hidden[part], target[part]
        z = buffers[0][: len(h)]
        project_rows(head, h, out=z)
        if reference is not None and ref_hidden is not None:
            project_rows(reference, ref_hidden[part], out=buffers[1][: len(h)])
        if kept is not None:  # before gradients take the logits' place
            row.append(row_sums(z, t, head.transform))
            if reference is not None:
                ref_row.append(row_sums(buffers[1][: len(h)], t, reference.transform))
        to = [
            RowLoss(
                losses[k][part],
                scales[k].rows[part],
                _narrow(buffers[k][: len(h)], h.dtype) if any(asked[k].wants) else None,
            )
            for k in range(len(asked))
        ]
        if reference is None:
            log_rows(z, t, to[0], eps, head.transform)
        else:
            kl_rows(
                z,
                buffers[1][: len(h)],
                t,
                kl=to[-1],
                ce=to[0] if ce is not None else None,
                transform=head.transform,
                ref_transform=reference.transform,
            )
        for k, total in enumerate(sums):
            gradient = to[k].gradient
            if gradient is not None:
                total.add(gradient, h, begin)
    if kept is not None:
        kept.index, kept.target, kept.hidden, kept.ref_hidden = index, target, hidden, ref_hidden
        kept.sums, kept.ref_sums = torch.cat(row), torch.cat(ref_row)
    if index is not None:
        losses = [
            total.new_zeros(len(head.hidden)).index_copy_(0, index, total) for total in losses
        ]
    return losses, [total.finish(index) for total in sums]


def _narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first bytes of every row of logits as a row of `dtype`: gradients need no buffer."""
    return logits.view(dtype)[:, : logits.shape[1]]
