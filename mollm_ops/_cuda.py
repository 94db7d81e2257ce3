"""Launches the extension's CUDA kernels on the current stream, never waiting for the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mollm_ops._extension import extension, listed, memory

_TABLES = 64  # recent pointer tables kept on the device: a training loop reuses a few of them
_tables: OrderedDict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor]] = []  # what CUDA graphs read whenever they are replayed


Memory = tuple[int, int]  # address and number of elements


class Slots(Protocol):
    """What an update reads and writes; see `mollm_ops.update.Targets`."""

    @property
    def params(self) -> Sequence[Tensor]: ...
    @property
    def first(self) -> Sequence[Tensor] | None: ...
    @property
    def second(self) -> Sequence[Tensor] | None: ...
    @property
    def steps(self) -> Sequence[Tensor]: ...


class Moments(NamedTuple):
    """What Adam's metric reads; see `mollm_ops.operands.AdamMetric`."""

    second: Sequence[Tensor | None]
    steps: Sequence[Tensor]
    weights: Tensor
    beta2: float
    eps: float


def device_table(entries: list[int], device: torch.device) -> Tensor:
    """The entries as int64 on the device. A table known to this stream costs no transfer.

    One that is made during a graph's capture is filled by the replays alone: it is kept for them,
    and nobody else may find it.
    """
    key = (torch.cuda.current_stream(device).cuda_stream, (device.index or 0, *entries))
    pair = _tables.pop(key, None)
    if pair is None:
        host = torch.tensor(entries, dtype=torch.int64).pin_memory()
        pair = host, host.to(device, non_blocking=True)
        if torch.cuda.is_current_stream_capturing():
            _captured.append(pair)
            return pair[1]
        if len(_tables) >= _TABLES:
            _tables.popitem(last=False)
    elif torch.cuda.is_current_stream_capturing():
        _captured.append(pair)
    _tables[key] = pair
    return pair[1]


def _lists_table(
    rows: Sequence[Tensor | None], counts: Sequence[int], device: torch.device
) -> tuple[Memory, int]:
    """Table of csrc/bindings.cpp, device_lists, and the number of chunks."""
    assert extension is not None, "the CUDA path implies the extension"
    first_chunk, chunks = [], 0
    for count in counts:
        first_chunk.append(chunks)
        chunks += -(-count // extension.CUDA_CHUNK)
    data, dtypes = listed("gradients", rows, counts, device)
    return _table([*data, *dtypes, *counts, *first_chunk], device), chunks


def _table(entries: list[int], device: torch.device) -> Memory:
    return memory("table", device_table(entries, device), torch.int64, device)


def _list_table(
    name: str, tensors: Sequence[Tensor | None], counts: Sequence[int], device: torch.device
) -> list[int]:
    addresses, dtypes = listed(name, tensors, counts, device)
    return [*addresses, *dtypes]


def _doubles(name: str, tensor: Tensor) -> Memory:
    return memory(name, tensor, torch.float64, tensor.device)


def _device(rows: Sequence[Tensor | None]) -> torch.device:
    return next(t.device for t in rows if t is not None)


def gram(rows: Sequence[Tensor | None], counts: Sequence[int], lists: int) -> Tensor:
    """G of K contiguous lists, float64 [K, K]."""
    assert extension is not None, "the CUDA path implies the extension"
    device = _device(rows)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        blocks = extension.cuda_grid(lists)
        out = torch.zeros(lists, lists, dtype=torch.float64, device=device)
        partials, arrived = _sums(lists * (lists + 1) // 2, blocks, device)
        extension.gram_cuda(
            table=table,
            lists=lists,
            tensors=len(counts),
            chunks=chunks,
            partials=_doubles("partials", partials),
            arrived=memory("arrived", arrived, torch.int32, device),
            blocks=blocks,
            gram=_doubles("gram", out),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def _sums(count: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Workspace of csrc/gram.h, GramWorkspace."""
    partials = torch.empty(count, blocks, dtype=torch.float64, device=device)
    return partials, torch.zeros(1, dtype=torch.int32, device=device)


def gram_moved(
    rows: Sequence[Tensor | None],
    counts: Sequence[int],
    lists: int,
    means: Sequence[Tensor | None] | None,
    beta: float,
    moments: Moments | None,
) -> Tensor:
    """G of K contiguous lists as `mollm_ops.gram.gram_moved` defines it, float64 [K, K]."""
    assert extension is not None, "the CUDA path implies the extension"
    device = _device(rows)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        blocks = extension.cuda_moved_grid(lists, means is not None)
        out = torch.zeros(lists, lists, dtype=torch.float64, device=device)
        partials, arrived = _sums(lists * (lists + 1) // 2, blocks, device)
        mean_table = moment_table = weights = None
        if means is not None:
            mean_table = _table(_list_table("means", means, counts, device), device)
        if moments is not None:
            entries = _list_table("exp_avg_sqs", moments.second, counts, device)
            entries += listed("steps", moments.steps, [1] * len(counts), device)[0]
            moment_table = _table(entries, device)
            weights = moments.weights.to(device=device, dtype=torch.float64).contiguous()
        extension.gram_moved_cuda(
            table=table,
            lists=lists,
            tensors=len(counts),
            chunks=chunks,
            means=mean_table,
            beta=beta,
            moments=moment_table,
            second_weights=None if weights is None else _doubles("weights", weights),
            beta2=0.0 if moments is None else moments.beta2,
            eps=0.0 if moments is None else moments.eps,
            partials=_doubles("partials", partials),
            arrived=memory("arrived", arrived, torch.int32, device),
            blocks=blocks,
            gram=_doubles("gram", out),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def update(
    rows: Sequence[Tensor | None],
    weights: Tensor,
    slots: Slots,
    options: dict[str, object],
    *,
    lr: Tensor | None,
    second_weights: Tensor | None,
    means: Sequence[Tensor | None] | None,
    beta: float,
    proceed: Tensor | None,
    track: bool,
) -> Tensor:
    """The step of `mollm_ops.update.update_` on contiguous tensors; g_k · Δθ, zeros without
    `track`."""
    assert extension is not None, "the CUDA path implies the extension"
    device = slots.params[0].device
    counts = [p.numel() for p in slots.params]
    none: list[Tensor | None] = [None] * len(counts)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        entries: list[int] = []
        entries += _list_table("params", slots.params, counts, device)
        entries += _list_table("first", slots.first or none, counts, device)
        entries += _list_table("second", slots.second or none, counts, device)
        entries += listed("steps", slots.steps, [1] * len(counts), device)[0]
        lists = len(rows) // len(counts)
        blocks = extension.cuda_grid(lists + 3)  # with parameter and state
        changes = torch.zeros(lists, dtype=torch.float64, device=device)
        partials, arrived = _sums(lists, blocks, device)
        # These stay referenced until the launch; the stream orders what comes after it.
        w = weights.to(device=device, dtype=torch.float64).contiguous()
        second = None if second_weights is None else second_weights.to(w).contiguous()
        rate = None if lr is None else lr.detach().to(w).contiguous()
        mean_table = None
        if means is not None:
            mean_table = _table(_list_table("means", means, counts, device), device)
        extension.update_cuda(
            table=table,
            lists=lists,
            tensors=len(counts),
            chunks=chunks,
            targets=_table(entries, device),
            weights=_doubles("weights", w),
            second_weights=None if second is None else _doubles("second_weights", second),
            means=mean_table,
            beta=beta,
            proceed=None if proceed is None else memory("proceed", proceed, torch.bool, device),
            lr=None if rate is None else _doubles("lr", rate),
            options=options,
            partials=_doubles("partials", partials),
            arrived=memory("arrived", arrived, torch.int32, device),
            blocks=blocks,
            changes=_doubles("changes", changes) if track else None,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return changes


def combine(
    rows: Sequence[Tensor | None], counts: Sequence[int], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """Σ_k w_k g_k of K contiguous lists into `out`."""
    assert extension is not None, "the CUDA path implies the extension"
    device = _device(rows)
    with torch.cuda.device(device):
        table, chunks = _lists_table(rows, counts, device)
        extension.combine_cuda(
            table=table,
            lists=weights.numel(),
            tensors=len(counts),
            chunks=chunks,
            weights=_doubles("weights", weights),
            out_table=_table(_list_table("out", out, counts, device), device),
            blocks=extension.cuda_grid(weights.numel()),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def _device_numbers(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers as float64 on the device, from the same cache as the tables."""
    bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64).tolist()
    return device_table(bits, device).view(torch.float64)


def solve(
    matrix: Tensor, rule: int, preferences: Sequence[float], normalize: bool, length: int
) -> Tensor:
    """[K weights, status, Pareto gap] of a float64 Gram matrix with at most 8 objectives."""
    assert extension is not None, "the CUDA path implies the extension"
    device = matrix.device
    with torch.cuda.device(device):
        matrix = matrix.contiguous()
        c = _device_numbers(tuple(preferences), device)
        packed = torch.empty(len(matrix) + 2, dtype=torch.float64, device=device)
        extension.solve_cuda(
            gram=_doubles("gram", matrix),
            objectives=len(matrix),
            rule=rule,
            preferences=_doubles("preferences", c),
            normalize=normalize,
            length=length,
            packed=_doubles("packed", packed),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return packed
