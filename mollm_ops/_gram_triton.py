"""Gram matrix and weighted sum in Triton, for GPUs whose extension was built without CUDA.

One launch per parameter; see `mollm_ops.gram` for the equations and csrc/gram_cuda.cu for the
kernels that are preferred. A parameter whose gradients differ in dtype is left to plain Torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from mollm_ops._cuda import device_table

MAX_ROWS = 8
_PROGRAMS_PER_SM = 4


def block_of(rows: int) -> int:
    """Elements of each row that a program of four warps takes at a time: the products of all rows
    by all rows must stay in registers."""
    return {1: 2048, 2: 1024, 4: 512, 8: 128}[rows]


# ---- kernels


@triton.jit
def _rows(table, like, K: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the K rows, and which of them are there.

    Where the compiler cannot know that they are multiples of 16 it loads two bytes at a time.
    """
    k = tl.arange(0, ROWS)
    addresses = tl.load(table + k, mask=k < K, other=0)
    rows = addresses.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    return rows, addresses != 0


@triton.jit
def gram_kernel(
    table,
    like,
    partials,
    count,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partials[program] = Σ x_i x_j over the blocks of this program, added in float64."""
    rows, present = _rows(table, like, K, ROWS, ALIGNED)
    total = tl.zeros((ROWS, ROWS), tl.float64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for begin in range(first, count, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = present[:, None] & (at < count)[None, :]
        x = tl.load(rows[:, None] + at[None, :], mask=mask, other=0.0)
        x = x.to(EXACT)
        # Rows whose squares a float cannot hold are scaled by a power of two first.
        largest = tl.max(tl.abs(x), 1)
        scale = tl.where(largest < 1e-10, 2.0**80, tl.where(largest > 1e10, 2.0**-70, 1.0))
        x *= scale.to(EXACT)[:, None]
        back = 1.0 / scale.to(tl.float64)
        products = tl.sum(x[:, None, :] * x[None, :, :], 2).to(tl.float64)
        total += products * (back[:, None] * back[None, :])
    i = tl.arange(0, ROWS)
    here = partials + tl.program_id(0) * ROWS * ROWS
    tl.store(here + i[:, None] * ROWS + i[None, :], total)


@triton.jit
def combine_kernel(
    table,
    like,
    weights,
    out,
    count,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """out = Σ_k w_k x_k; a row of weight 0 is not read."""
    rows, present = _rows(table, like, K, ROWS, ALIGNED)
    k = tl.arange(0, ROWS)
    w = tl.load(weights + k, mask=k < K, other=0.0).to(EXACT)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for begin in range(first, count, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = (present & (w != 0))[:, None] & (at < count)[None, :]
        x = tl.load(rows[:, None] + at[None, :], mask=mask, other=0.0).to(EXACT)
        total = tl.sum(w[:, None] * x, 0)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


# ---- launchers


def serves(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the gradients of one parameter are alike, and few enough."""
    return len(tensors) <= MAX_ROWS and len({t.dtype for t in tensors if t is not None}) == 1


def _exact(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _launch(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, int, int]:
    """Table of addresses, one of the rows, ROWS and the number of programs."""
    like = next(t for t in tensors if t is not None)
    entries = [0 if t is None else t.data_ptr() for t in tensors]
    rows = triton.next_power_of_2(len(tensors))
    blocks = triton.cdiv(like.numel(), block_of(rows))
    if not like.is_cuda:  # Triton's interpreter
        return torch.tensor(entries, dtype=torch.int64), like, rows, min(3, blocks)
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    return (
        device_table(entries, like.device),
        like,
        rows,
        min(_PROGRAMS_PER_SM * processors, blocks),
    )


def _device_of(t: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def gram_triton(tensors: Sequence[Tensor | None]) -> Tensor:
    """G of the K contiguous gradients of one parameter, float64 [K, K]."""
    table, like, rows, programs = _launch(tensors)
    partials = torch.zeros(programs, rows, rows, dtype=torch.float64, device=like.device)
    if programs:
        with _device_of(like):
            gram_kernel[(programs,)](
                table,
                like,
                partials,
                like.numel(),
                K=len(tensors),
                ROWS=rows,
                ALIGNED=_aligned(tensors),
                BLOCK=block_of(rows),
                EXACT=_exact(like.dtype),
            )
    return partials.sum(0)[: len(tensors), : len(tensors)]


def combine_triton(tensors: Sequence[Tensor | None], weights: Tensor, out: Tensor) -> None:
    """Σ_k w_k g_k of the K contiguous gradients of one parameter into `out`."""
    table, like, rows, programs = _launch(tensors)
    if programs:
        wide = torch.promote_types(like.dtype, out.dtype)
        with _device_of(like):
            combine_kernel[(programs,)](
                table,
                like,
                weights,
                out,
                like.numel(),
                K=len(tensors),
                ROWS=rows,
                ALIGNED=_aligned(tensors),
                BLOCK=block_of(rows),
                EXACT=_exact(wide),
            )
