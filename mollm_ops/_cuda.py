"""Launches the extension's CUDA kernels on the current stream, never waiting for the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mollm_ops._extension import addresses, dtype_codes, extension

_TABLES = 64  # recent pointer tables kept on the device: a training loop reuses a few of them
_tables: OrderedDict[tuple[int, tuple[int, ...]], Tensor] = OrderedDict()


def _device_table(entries: list[int], device: torch.device) -> Tensor:
    """The entries as int64 on the device. A table known to this stream costs no transfer."""
    key = (torch.cuda.current_stream(device).cuda_stream, (device.index or 0, *entries))
    table = _tables.pop(key, None)
    if table is None:
        host = torch.tensor(entries, dtype=torch.int64).pin_memory()
        table = host.to(device, non_blocking=True)
        if len(_tables) >= _TABLES:
            _tables.popitem(last=False)
    _tables[key] = table
    return table


def _lists_table(
    rows: Sequence[Tensor | None], counts: Sequence[int], device: torch.device
) -> tuple[Tensor, int]:
    """Table of csrc/bindings.cpp, device_lists, and the number of chunks."""
    assert extension is not None, "the CUDA path implies the extension"
    first_chunk, chunks = [], 0
    for count in counts:
        first_chunk.append(chunks)
        chunks += -(-count // extension.CUDA_CHUNK)
    entries = [*addresses(rows), *dtype_codes(rows), *counts, *first_chunk]
    return _device_table(entries, device), chunks


def _device(rows: Sequence[Tensor | None]) -> torch.device:
    return next(t.device for t in rows if t is not None)


def gram(rows: Sequence[Tensor | None], counts: Sequence[int], lists: int) -> Tensor:
    """G of K contiguous lists, float64 [K, K]."""
    assert extension is not None, "the CUDA path implies the extension"
    device = _device(rows)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        blocks = extension.cuda_grid()
        out = torch.zeros(lists, lists, dtype=torch.float64, device=device)
        partials = torch.empty(lists * (lists + 1) // 2, blocks, dtype=torch.float64, device=device)
        arrived = torch.zeros(1, dtype=torch.int32, device=device)
        extension.gram_cuda(
            table=table.data_ptr(),
            lists=lists,
            tensors=len(counts),
            chunks=chunks,
            partials=partials.data_ptr(),
            arrived=arrived.data_ptr(),
            blocks=blocks,
            gram=out.data_ptr(),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def combine(
    rows: Sequence[Tensor | None], counts: Sequence[int], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """Σ_k w_k g_k of K contiguous lists into `out`."""
    assert extension is not None, "the CUDA path implies the extension"
    device = _device(rows)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        extension.combine_cuda(
            table=table.data_ptr(),
            lists=weights.numel(),
            tensors=len(counts),
            chunks=chunks,
            weights=weights.data_ptr(),
            out_table=_device_table([*addresses(out), *dtype_codes(out)], device).data_ptr(),
            blocks=extension.cuda_grid(),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def solve(
    matrix: Tensor, rule: int, preferences: Sequence[float], normalize: bool, length: int
) -> Tensor:
    """[K weights, status, Pareto gap] of a float64 Gram matrix with at most 8 objectives."""
    assert extension is not None, "the CUDA path implies the extension"
    device = matrix.device
    with torch.cuda.device(device):
        matrix = matrix.contiguous()
        c = torch.tensor(preferences, dtype=torch.float64).pin_memory()
        c = c.to(device, non_blocking=True)
        packed = torch.empty(len(matrix) + 2, dtype=torch.float64, device=device)
        extension.solve_cuda(
            gram=matrix.data_ptr(),
            objectives=len(matrix),
            rule=rule,
            preferences=c.data_ptr(),
            normalize=normalize,
            length=length,
            packed=packed.data_ptr(),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return packed
