"""Checks of arguments that several ops share. Each error is one sentence with the value in it.

They are made before anything is written. What they cannot see, that a tensor has the memory it says
it has, is checked by `mollm_ops._extension.listed`, which takes the address.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from mollm_ops._dtypes import name_of
from mollm_ops._extension import DTYPE_CODES

GradientLists = Sequence[Sequence[Tensor | None]]
Numbers = NDArray[np.int64]


# ---- one tensor, one number


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_CODES:
        known = ", ".join(name_of(d) for d in DTYPE_CODES)
        raise TypeError(f"{name} must be one of {known}, but got {name_of(tensor.dtype)}.")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but got {type(value).__name__}.")


def check_range(name: str, value: float, low: float, below: float = math.inf) -> None:
    """low ≤ value < below."""
    if not low <= value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise ValueError(f"{name} must be at least {low}{limit}, but got {value}.")


def check_weights(name: str, weights: Tensor, lists: int) -> None:
    """One real number for each of K lists of gradients."""
    check_tensor(name, weights)
    if weights.shape != (lists,):
        raise ValueError(
            f"{name} must have one entry per list of gradients ({lists}), "
            f"but got shape {tuple(weights.shape)}."
        )
    if weights.is_complex():
        raise TypeError(f"{name} must be real numbers, but got {name_of(weights.dtype)}.")


def check_scalar(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """One number of that dtype on that device."""
    check_tensor(name, value)
    if value.numel() != 1 or value.device != device:
        raise ValueError(
            f"{name} must be one number on {device}, but got shape {tuple(value.shape)} on "
            f"{value.device}."
        )
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {name_of(dtype)}, but got {name_of(value.dtype)}.")


# ---- lists of gradients


def check_structure(gradients: GradientLists) -> None:
    """K lists of equally many dense tensors or None, and at least one tensor."""
    if len(gradients) == 0:
        raise ValueError("gradients must hold at least one list, but got none.")
    length = len(gradients[0])
    for k, tensors in enumerate(gradients):
        if len(tensors) != length:
            raise ValueError(
                f"gradients[{k}] must have as many tensors as gradients[0] ({length}), "
                f"but got {len(tensors)}; put None where an objective has no gradient."
            )
        for n, t in enumerate(tensors):
            if t is None:
                continue
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"gradients[{k}][{n}] must be a tensor or None, but got {type(t).__name__}."
                )
            if t.layout != torch.strided:
                raise TypeError(f"gradients[{k}][{n}] must be dense, but got layout {t.layout}.")
    if all(t is None for tensors in gradients for t in tensors):
        raise ValueError("gradients must hold at least one tensor, but every entry is None.")


def check_alike(gradients: GradientLists) -> None:
    """The same shape in every list, one device, supported dtypes."""
    first: list[tuple[int, torch.Size] | None] = [None] * len(gradients[0])
    device: torch.device | None = None
    for k, tensors in enumerate(gradients):
        for n, t in enumerate(tensors):
            if t is None:
                continue
            if t.dtype not in DTYPE_CODES:
                check_dtype(f"gradients[{k}][{n}]", t)
            device = t.device if device is None else device
            if t.device != device:
                raise ValueError(f"gradients[{k}][{n}] must be on {device}, but got {t.device}.")
            known = first[n]
            if known is None:
                first[n] = (k, t.shape)
            elif t.shape != known[1]:
                raise ValueError(
                    f"gradients[{k}][{n}] must have the shape of gradients[{known[0]}][{n}], "
                    f"{tuple(known[1])}, but got {tuple(t.shape)}."
                )


def check_gradients(gradients: GradientLists) -> None:
    """K lists of the same tensors' gradients: same lengths, shapes and device, supported dtypes."""
    check_structure(gradients)
    check_alike(gradients)


def check_flat(flat: Sequence[Tensor | None], lists: int) -> GradientLists:
    """The K lists that were joined into `flat`, as registered ops take them, checked."""
    if lists < 1 or len(flat) % lists:
        raise ValueError(
            f"lists must be at least 1 and divide the number of tensors ({len(flat)}), "
            f"but got {lists}."
        )
    tensors = len(flat) // lists
    gradients = [flat[k * tensors : (k + 1) * tensors] for k in range(lists)]
    check_gradients(gradients)
    return gradients


def refuse_transforms(name: str, tensors: Iterable[Tensor | None]) -> None:
    """The ops are constants to autograd: a derivative through them would be a silent 0."""
    transformed = torch._C._functorch.maybe_current_level() is not None
    if not transformed and forward_ad._current_level < 0:
        return
    for t in tensors:
        if not isinstance(t, Tensor):
            continue
        wrapped = transformed and torch._C._functorch.is_functorch_wrapped_tensor(t)
        if wrapped or _tangent(t) is not None:
            raise RuntimeError(
                f"{name} must be called outside torch.func's transforms and forward-mode autograd, "
                "but got a tensor of one: it has no derivative; differentiate the functions of "
                "mollm_ops.reference instead."
            )


def _tangent(t: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return tangent


def refuse_without_memory(name: str, tensors: Iterable[Tensor | None]) -> None:
    """For functions that are not traceable, which need the tensors' contents."""
    for t in tensors:
        if isinstance(t, Tensor) and (t.is_meta or isinstance(t, FakeTensor)):
            kind = "meta" if t.is_meta else "fake"
            raise TypeError(
                f"{name} must be given tensors with memory, but got a {kind} tensor: it cannot be "
                "traced; call it outside FakeTensorMode."
            )


# ---- lists beside the gradients


def check_list(
    name: str,
    tensors: Sequence[Tensor | None],
    like: Sequence[Tensor | None],
    device: torch.device,
    *,
    optional: bool = False,
) -> None:
    """A dense tensor on `device` for each entry of `like`, of its shape where there is one."""
    if len(tensors) != len(like):
        raise ValueError(
            f"{name} must have one tensor per parameter ({len(like)}), but got {len(tensors)}."
        )
    for n, (t, p) in enumerate(zip(tensors, like, strict=True)):
        if t is None and optional:
            continue
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            got = t.layout if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}[{n}] must be a dense tensor, but got {got}.")
        if t.device != device or (p is not None and t.shape != p.shape):
            shape = tuple(t.shape if p is None else p.shape)
            raise ValueError(
                f"{name}[{n}] must have shape {shape} on {device}, but got {tuple(t.shape)} on "
                f"{t.device}."
            )
        if t.dtype not in DTYPE_CODES:
            check_dtype(f"{name}[{n}]", t)


def check_steps(
    name: str, steps: Sequence[Tensor], count: int, device: torch.device, first: int
) -> None:
    """A float32 scalar for each parameter; on the CPU, where none waits for them, from `first`."""
    if len(steps) != count:
        raise ValueError(
            f"{name} must have one tensor per parameter ({count}), but got {len(steps)}."
        )
    for n, t in enumerate(steps):
        check_scalar(f"{name}[{n}]", t, torch.float32, device)
        if device.type == "cpu" and not isinstance(t, FakeTensor):
            check_range(f"{name}[{n}]", float(t), first, 2**32)


def check_metric(
    gradients: GradientLists,
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    weights: Tensor,
) -> None:
    """The tensors of Adam's metric: see `mollm_ops.operands.AdamMetric`."""
    like = [next((t for t in ts if t is not None), None) for ts in zip(*gradients, strict=True)]
    device = next(t.device for t in like if t is not None)
    check_list("exp_avg_sqs", exp_avg_sqs, like, device, optional=True)
    check_steps("steps", steps, len(like), device, first=0)
    check_weights("the metric's weights", weights, len(gradients))


def check_means(gradients: GradientLists, means: GradientLists, beta: float) -> None:
    """Running means that match the gradients: one wherever there is a gradient, contiguous."""
    if len(means) != len(gradients):
        raise ValueError(
            f"means must be as many lists as gradients ({len(gradients)}), but got {len(means)}."
        )
    check_range("beta", beta, 0, 1)
    check_gradients([*gradients, *means])
    for k, (tensors, row) in enumerate(zip(gradients, means, strict=True)):
        for n, (t, mean) in enumerate(zip(tensors, row, strict=True)):
            if t is not None and (mean is None or not mean.is_contiguous()):
                got = "None" if mean is None else "one that is not"
                raise ValueError(f"means[{k}][{n}] must be a contiguous tensor, but got {got}.")


# ---- memory that is written

Named = Sequence[tuple[str, Sequence[Tensor | None]]]


def check_apart(written: Named, read: Named, in_place: str | None = None) -> None:
    """No tensor that is written shares memory with another one, or an element with itself.

    Args:
        in_place: the name of a list in `read`, or of K lists one after the other, whose n-th tensor
            may be the n-th of the first list in `written`.
    """
    writes = sum(t is not None for _, group in written for t in group)
    named = [
        ((name, n), t)
        for name, group in (*written, *read)
        for n, t in enumerate(group)
        if t is not None
    ]
    places, tensors = [place for place, _ in named], [t for _, t in named]
    for (name, n), t in zip(places[:writes], tensors, strict=False):
        if torch._debug_has_internal_overlap(t) == 1:
            raise ValueError(
                f"{name}[{n}] must not hold one element in several places, but got strides "
                f"{t.stride()}; pass a clone of it."
            )
    if not any_crossing(*sorted_spans(_table([_span_of_storage(t) for t in tensors])), writes):
        return
    columns = len(written[0][1])
    for i, j in _crossing([span_of(t) for t in tensors], writes):
        (name, n), (other, m) = places[i], places[j]
        allowed = other == in_place and name == written[0][0] and n == m % columns
        if not (allowed and _is_same(tensors[i], tensors[j])) and _share(tensors[i], tensors[j]):
            raise ValueError(
                f"{name}[{n}] must not share memory with {other}[{m}], but got overlapping "
                "tensors; pass a clone of one of them."
            )


def _span_of_storage(t: Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last."""
    storage = t.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()


def span_of(t: Tensor) -> tuple[int, int]:
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _table(spans: list[tuple[int, int]]) -> Numbers:
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def sorted_spans(table: Numbers) -> tuple[Numbers, Numbers]:
    """The numbers of the spans that are not empty, in the order of their first bytes; the spans."""
    order = np.argsort(table[:, 0], kind="stable")
    order = order[table[order, 0] < table[order, 1]]
    return order, table[order]


def any_crossing(order: Numbers, spans: Numbers, writes: int) -> bool:
    """Whether one of the first `writes` spans overlaps another; two that are read may."""
    starts, ends, written = spans[1:, 0], spans[:, 1], order < writes
    before = np.maximum.accumulate(ends)[:-1]
    before_written = np.maximum.accumulate(np.where(written, ends, 0))[:-1]
    return bool((starts < np.where(written[1:], before, before_written)).any())


def _crossing(spans: list[tuple[int, int]], writes: int) -> list[tuple[int, int]]:
    """Pairs of spans that overlap, smaller number first, of which that one is written."""
    order, ordered = sorted_spans(_table(spans))
    if not any_crossing(order, ordered, writes):
        return []
    pairs = []
    for a, i in enumerate(order.tolist()):
        last = np.searchsorted(ordered[:, 0], ordered[a, 1])
        pairs += [
            (min(i, j), max(i, j)) for j in order[a + 1 : last].tolist() if min(i, j) < writes
        ]
    return sorted(pairs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _share(a: Tensor, b: Tensor) -> bool:
    """Of tensors whose spans overlap: whether an element of one lies in one of the other."""
    if (a.is_contiguous() and b.is_contiguous()) or a.device != b.device:
        return a.device == b.device
    size = a.element_size()
    start = min(a.data_ptr(), b.data_ptr())
    if b.element_size() != size or (a.data_ptr() - b.data_ptr()) % size:
        return True  # as good as certain, and not worth counting bytes
    end = max(span_of(a)[1], span_of(b)[1])
    taken = torch.zeros((end - start) // size, dtype=torch.bool, device=a.device)
    views = [taken.as_strided(t.shape, t.stride(), (t.data_ptr() - start) // size) for t in (a, b)]
    views[0].fill_(True)
    return bool(views[1].any())


def flattened(lists: GradientLists) -> list[Tensor | None]:
    return list(chain.from_iterable(lists))
