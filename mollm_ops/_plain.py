"""Calls of plain contiguous tensors on the CPU: checked in one walk, past the dispatcher.

The ops' own checks, `mollm_ops._checks`, deal with every kind of tensor and say what is wrong with
one, which takes microseconds a tensor, several times over for a model of thousands of small ones.
Here a walk looks once at everything the kernels rely on. It knows only yes and no: what is not
plainly in order is None, and left to the op, which takes it or refuses it in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mollm_ops._checks import GradientLists, Numbers, any_crossing, sorted_spans, span_of
from mollm_ops._extension import DTYPE_CODES, MAX_ROWS, extension

_PLAIN = (Tensor, torch.nn.Parameter)
_LISTS = (list, tuple)
_SIZES = [dtype.itemsize for dtype in DTYPE_CODES]


class Tensors(NamedTuple):
    """Some lists of tensors of the same shapes, as the extension takes them."""

    data: list[int]
    """Addresses; 0 for None and for a tensor without elements."""
    dtypes: list[int]
    counts: list[int]
    shapes: list[torch.Size | None]
    """Those of a list; None where no list has a tensor."""
    held: list[tuple[Tensor | None, ...]]
    """The tensors, so that their memory stays."""

    @property
    def listed(self) -> tuple[list[int], list[int]]:
        return self.data, self.dtypes


def eager() -> bool:
    """Whether nothing watches or transforms the calls of ops, as a compiler and its fakes do."""
    return (
        extension is not None
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def walk(
    lists: Sequence[Sequence[Tensor | None]],
    like: Tensors | None = None,
    *,
    optional: bool = False,
) -> Tensors | None:
    """Addresses and dtypes of K lists of N tensors; None where not everything is in order.

    Args:
        lists: the lists.
        like: other lists, whose shapes these must have.
        optional: whether an entry may be None.
    """
    if type(lists) not in _LISTS or any(type(tensors) not in _LISTS for tensors in lists):
        return None
    try:
        return _walk([tuple(tensors) for tensors in lists], like, optional)
    except (RuntimeError, NotImplementedError):  # of a tensor without strides or memory
        return None


def _walk(
    lists: list[tuple[Tensor | None, ...]], like: Tensors | None, optional: bool
) -> Tensors | None:
    if not 0 < len(lists) <= MAX_ROWS or not len(lists[0]):
        return None
    columns = len(lists[0]) if like is None else len(like.counts)
    shapes: list[torch.Size | None] = [None] * columns if like is None else list(like.shapes)
    counts = [0] * columns if like is None else list(like.counts)
    data: list[int] = []
    dtypes: list[int] = []
    for tensors in lists:
        if len(tensors) != columns:
            return None
        for n, t in enumerate(tensors):
            if t is None and optional:
                data.append(0)
                dtypes.append(0)
                continue
            if t is None or type(t) not in _PLAIN:
                return None
            code, shape = DTYPE_CODES.get(t.dtype), t.shape
            if shapes[n] is None:
                shapes[n], counts[n] = shape, t.numel()
            if (
                code is None
                or shape != shapes[n]
                or not t.is_cpu
                or not t.is_contiguous()
                or t.is_neg()
            ):
                return None
            count, size = counts[n], _SIZES[code]
            address = t.data_ptr() if count else 0
            if t.untyped_storage().nbytes() < (t.storage_offset() + count) * size:
                return None
            if count and not address:
                return None
            data.append(address)
            dtypes.append(code)
    return Tensors(data, dtypes, counts, shapes, lists)


def gradients_of(lists: GradientLists) -> Tensors | None:
    """K lists of gradients in which every parameter has one, for a call in eager mode."""
    if not eager():
        return None
    found = walk(lists, optional=True)
    return None if found is None or None in found.shapes else found


def covers(means: Tensors, gradients: Tensors) -> bool:
    """Whether there is a mean wherever there is a gradient."""
    return len(means.data) == len(gradients.data) and all(
        mean or not g for mean, g in zip(means.data, gradients.data, strict=True)
    )


def counters(steps: Sequence[Tensor], columns: int, first: int) -> Tensors | None:
    """One float32 number from `first` for each of N parameters."""
    if type(steps) not in _LISTS or len(steps) != columns:
        return None
    addresses = []
    for t in steps:
        if (
            type(t) not in _PLAIN
            or t.dtype != torch.float32
            or not t.is_cpu
            or t.layout != torch.strided
            or t.numel() != 1
            or t.is_neg()
            or t.untyped_storage().nbytes() < (t.storage_offset() + 1) * 4
            or not first <= t.item() < 2**32
        ):
            return None
        addresses.append(t.data_ptr())
    codes = [DTYPE_CODES[torch.float32]] * columns
    shapes: list[torch.Size | None] = [torch.Size()] * columns
    return Tensors(addresses, codes, [1] * columns, shapes, [tuple(steps)])


def numbers(*given: Tensor | None) -> list[tuple[int, int]] | None:
    """The spans of the numbers that a call reads, [first byte, byte after the last]."""
    tensors = [t for t in given if t is not None]
    if any(type(t) not in _PLAIN or not t.is_cpu or t.layout != torch.strided for t in tensors):
        return None
    return [span_of(t) for t in tensors]


def without(read: Tensors, written: Tensors) -> Tensors:
    """What is read, less what is written in its own place: tensor n of a list, to be tensor n."""
    places = list(zip(written.data, written.dtypes, strict=True))
    both = zip(read.data, read.dtypes, strict=True)
    data = [0 if at == places[i % len(places)] else at[0] for i, at in enumerate(both)]
    return read._replace(data=data)


def apart(
    written: Sequence[Tensors], read: Sequence[Tensors], others: Sequence[tuple[int, int]] = ()
) -> bool:
    """Whether nothing that is written shares memory with anything else.

    Args:
        written: Lists that are written.
        read: Lists that are only read.
        others: Spans of what else is read.
    """
    lists = [_spans(some) for some in (*written, *read)]
    spans = np.concatenate([*lists, np.array(others, dtype=np.int64).reshape(-1, 2)])
    return not any_crossing(*sorted_spans(spans), sum(map(len, lists[: len(written)])))


def _spans(some: Tensors) -> Numbers:
    """First byte of each tensor, and the byte after the last; both 0 for None."""
    starts = np.array(some.data, dtype=np.int64).reshape(-1, len(some.counts))
    sizes = np.take(_SIZES, some.dtypes).reshape(starts.shape) * some.counts
    return np.stack([starts, np.where(starts, starts + sizes, 0)], axis=-1).reshape(-1, 2)
