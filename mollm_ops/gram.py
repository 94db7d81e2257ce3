"""The Gram matrix of K gradients, their weighted sum, and both around the dual-space solver."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from mollm_ops import _cuda, _plain
from mollm_ops._checks import (
    GradientLists,
    check_apart,
    check_flat,
    check_gradients,
    check_list,
    check_means,
    check_metric,
    check_range,
    check_structure,
    check_tensor,
    check_weights,
    flattened,
    refuse_transforms,
    refuse_without_memory,
    span_of,
)
from mollm_ops._extension import (
    MAX_OBJECTIVES,
    MAX_ROWS,
    extension,
    has_kernels_for,
    listed,
    memory,
)
from mollm_ops.dual_space import Solution, dual_space_weights
from mollm_ops.operands import AdamMetric, RunningMeans
from mollm_ops.reference.gram import (
    combine_reference,
    gram_moved_reference,
    gram_reference,
    slices,
)

# ---- kernels and Torch's view of them


def _contiguous(flat: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.resolve_neg().contiguous() for t in flat]


def _counts(flat: Sequence[Tensor | None], lists: int) -> list[int]:
    tensors = len(flat) // lists
    columns = (flat[n::tensors] for n in range(tensors))
    return [next((t.numel() for t in column if t is not None), 0) for column in columns]


def _lists(flat: Sequence[Tensor | None], lists: int) -> list[Sequence[Tensor | None]]:
    tensors = len(flat) // lists
    return [flat[k * tensors : (k + 1) * tensors] for k in range(lists)]


def _has_kernels(device: torch.device, lists: int) -> bool:
    most = MAX_ROWS if device.type == "cpu" else MAX_OBJECTIVES
    return has_kernels_for(device) and lists <= most


def _device(flat: Sequence[Tensor | None]) -> torch.device:
    return next(t.device for t in flat if t is not None)


def _where(counts: Sequence[int], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Without those of the parameters that no list has a gradient of, or that are empty."""
    return [t if count else None for count, t in zip(counts, tensors, strict=True)]


@torch.library.custom_op("mollm::gram", mutates_args=())
def _gram(flat: Sequence[Tensor | None], lists: int) -> Tensor:
    check_flat(flat, lists)
    device = _device(flat)
    rows = _contiguous(flat)
    if not _has_kernels(device, lists):
        return _gram_without_extension(_lists(rows, lists))
    if device.type == "cuda":
        return _cuda.gram(rows, _counts(rows, lists), lists)
    return _gram_cpu(rows, lists)


def _has_triton(tensors: Sequence[Tensor | None]) -> bool:
    """Whether Triton serves the gradients of one parameter."""
    first = next((t for t in tensors if t is not None), None)
    if first is None or not first.is_cuda or find_spec("triton") is None:
        return False
    from mollm_ops._gram_triton import serves

    return serves(tensors)


def _gram_without_extension(lists: list[Sequence[Tensor | None]]) -> Tensor:
    columns = [c for c in zip(*lists, strict=True) if any(t is not None for t in c)]
    alike = [n for n, tensors in enumerate(columns) if _has_triton(tensors)]
    rest = [n for n in range(len(columns)) if n not in set(alike)]
    total = torch.zeros(len(lists), len(lists), dtype=torch.float64, device=_device(columns[0]))
    if alike:
        from mollm_ops._gram_triton import gram_triton

        for n in alike:
            total += gram_triton(columns[n])
    if rest:
        total += gram_reference(list(zip(*(columns[n] for n in rest), strict=True)))
    return total


def _combine_without_extension(
    lists: list[Sequence[Tensor | None]], weights: Tensor, out: Sequence[Tensor]
) -> None:
    for tensors, to in zip(zip(*lists, strict=True), out, strict=True):
        if _has_triton(tensors) and to.is_contiguous():
            from mollm_ops._gram_triton import combine_triton

            combine_triton(tensors, weights, to)
        else:
            (value,) = combine_reference([[t] for t in tensors], weights)
            assert value is not None, "combine leaves out the tensors that no list has"
            to.copy_(value)


def _gram_cpu(
    rows: Sequence[Tensor | None],
    lists: int,
    moving: RunningMeans | None = None,
    metric: AdamMetric | None = None,
) -> Tensor:
    assert extension is not None, "_has_kernels implies the extension"
    device = _device(rows)
    counts = _counts(rows, lists)
    out = torch.zeros(lists, lists, dtype=torch.float64, device="cpu")
    means = [] if moving is None else _contiguous(flattened(moving.means))
    moments = [] if metric is None else _contiguous(_where(counts, metric.exp_avg_sqs))
    data, dtypes = listed("gradients", rows, counts, device)
    extension.gram_cpu(
        data=data,
        dtypes=dtypes,
        counts=counts,
        means=moving and (listed("means", means, counts, device), moving.beta),
        metric=metric and _metric(metric, listed("exp_avg_sqs", moments, counts, device)),
        gram=memory("gram", out, torch.float64, device),
        threads=torch.get_num_threads(),
    )
    return out


def _metric(metric: AdamMetric, moments: tuple[list[int], list[int]]) -> tuple[object, ...]:
    """The metric as csrc/bindings.cpp takes it."""
    steps = [step.item() for step in metric.steps]
    corrections = {t: 1 - metric.beta2 ** (t + 1) for t in set(steps)}
    return (
        moments,
        [corrections[t] for t in steps],
        metric.weights.tolist(),
        metric.beta2,
        metric.eps,
    )


def _gram_plain(
    gradients: GradientLists,
    moving: RunningMeans | None = None,
    metric: AdamMetric | None = None,
) -> Tensor | None:
    """The Gram matrix of plain tensors; None where they must go by the op."""
    found = _plain.gradients_of(gradients)
    if found is None or extension is None:
        return None
    means = moments = None
    if moving is not None:
        means = _plain.walk(moving.means, found, optional=True)
        if means is None or not _plain.covers(means, found):
            return None
        check_range("beta", moving.beta, 0, 1)
    if metric is not None:
        moments = _plain.walk([metric.exp_avg_sqs], found, optional=True)
        steps = _plain.counters(metric.steps, len(found.counts), 0)
        if moments is None or steps is None or _plain.numbers(metric.weights) is None:
            return None
        check_weights("the metric's weights", metric.weights, len(gradients))
        check_range("beta2", metric.beta2, 0, 1)
        check_range("eps", metric.eps, 0)
    lists = len(gradients)
    out = torch.zeros(lists, lists, dtype=torch.float64, device="cpu")
    extension.gram_cpu(
        data=found.data,
        dtypes=found.dtypes,
        counts=found.counts,
        means=None if moving is None or means is None else (means.listed, moving.beta),
        metric=None if metric is None or moments is None else _metric(metric, moments.listed),
        gram=memory("gram", out, torch.float64, out.device),
        threads=torch.get_num_threads(),
    )
    return out


@_gram.register_fake
def _(flat: Sequence[Tensor | None], lists: int) -> Tensor:
    check_flat(flat, lists)
    return torch.empty(lists, lists, dtype=torch.float64, device=_device(flat))


@torch.library.custom_op("mollm::combine_", mutates_args=("out",))
def _combine_(flat: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    _check_combine(flat, weights, out)
    check_apart([("out", out)], [("gradients", flat), ("weights", [weights])], "gradients")
    lists = weights.numel()
    device = _device(flat)
    rows = _contiguous(flat)
    if not _has_kernels(device, lists):
        _combine_without_extension(_lists(rows, lists), weights, out)
        return
    targets = [t.contiguous() for t in out]
    counts = _counts(rows, lists)
    if device.type == "cuda":
        _cuda.combine(rows, counts, weights, targets)
    else:
        _combine_cpu(rows, counts, weights, targets)
    for to, value in zip(out, targets, strict=True):
        if value.data_ptr() != to.data_ptr():
            to.copy_(value)


def _combine_cpu(
    rows: Sequence[Tensor | None], counts: Sequence[int], weights: Tensor, out: Sequence[Tensor]
) -> None:
    assert extension is not None, "_has_kernels implies the extension"
    device = _device(rows)
    data, dtypes = listed("gradients", rows, counts, device)
    extension.combine_cpu(
        data=data,
        dtypes=dtypes,
        counts=counts,
        weights=memory("weights", weights, torch.float64, device),
        out=listed("out", out, counts, device),
        threads=torch.get_num_threads(),
    )


def _combine_plain(
    gradients: GradientLists, weights: Tensor, out: Sequence[Tensor | None] | None
) -> list[Tensor | None] | None:
    """The weighted sum of plain tensors; None where they must go by the op."""
    found = _plain.gradients_of(gradients)
    if found is None or extension is None or _plain.numbers(weights) is None:
        return None
    check_weights("weights", weights, len(gradients))
    w = weights.detach().to(dtype=torch.float64).contiguous()
    if out is None:
        columns = zip(*found.held, strict=True)
        out = [torch.empty_like(next(t for t in ts if t is not None)) for ts in columns]
    to = _plain.walk([out], found)
    if to is None or any(t is not None and t.requires_grad for t in out):
        return None
    if not _plain.apart([to], [_plain.without(found, to)], [span_of(w), span_of(weights)]):
        return None
    torch.autograd.graph.increment_version([t for t in to.held[0] if t is not None])
    extension.combine_cpu(
        data=found.data,
        dtypes=found.dtypes,
        counts=found.counts,
        weights=memory("weights", w, torch.float64, w.device),
        out=to.listed,
        threads=torch.get_num_threads(),
    )
    return list(to.held[0])


def _dots_plain(gradients: GradientLists, x: Sequence[Tensor]) -> Tensor | None:
    """Dot products with plain tensors; None where they must go by the op."""
    found = _plain.gradients_of(gradients)
    column = None if found is None else _plain.walk([x], found)
    if found is None or column is None or extension is None:
        return None
    out = torch.zeros(len(gradients), dtype=torch.float64, device="cpu")
    extension.dots_cpu(
        data=found.data,
        dtypes=found.dtypes,
        counts=found.counts,
        x=column.listed,
        dots=memory("dots", out, torch.float64, out.device),
        threads=torch.get_num_threads(),
    )
    return out


@_combine_.register_fake
def _(flat: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    _check_combine(flat, weights, out)


def _check_combine(flat: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    lists = weights.numel()
    gradients = check_flat(flat, lists)
    device = _device(flat)
    check_weights("weights", weights, lists)
    if weights.dtype != torch.float64 or weights.device != device:
        raise TypeError(
            f"weights must be float64 on {device}, but got {weights.dtype} on {weights.device}."
        )
    like = [next((t for t in ts if t is not None), None) for ts in zip(*gradients, strict=True)]
    check_list("out", out, like, device)


@torch.library.custom_op("mollm::dots", mutates_args=())
def _dots(flat: Sequence[Tensor | None], lists: int, x: Sequence[Tensor]) -> Tensor:
    _check_dots(flat, lists, x)
    device = _device(flat)
    if lists > MAX_ROWS or device.type != "cpu" or not has_kernels_for(device):
        total = torch.zeros(lists, dtype=torch.float64, device=device)
        for tensors in zip(*_lists(flat, lists), x, strict=True):
            for *row, t in slices(tensors):
                wide = t.double()  # type: ignore[union-attr]
                for k, g in enumerate(row):
                    if g is not None:
                        total[k] += g.double() @ wide
        return total
    assert extension is not None, "has_kernels_for(cpu) implies the extension"
    rows, column = _contiguous(flat), _contiguous(x)
    counts = [t.numel() for t in x]
    out = torch.zeros(lists, dtype=torch.float64, device="cpu")
    data, dtypes = listed("gradients", rows, counts, device)
    extension.dots_cpu(
        data=data,
        dtypes=dtypes,
        counts=counts,
        x=listed("x", column, counts, device),
        dots=memory("dots", out, torch.float64, device),
        threads=torch.get_num_threads(),
    )
    return out


@_dots.register_fake
def _(flat: Sequence[Tensor | None], lists: int, x: Sequence[Tensor]) -> Tensor:
    _check_dots(flat, lists, x)
    return torch.empty(lists, dtype=torch.float64, device=_device(flat))


def _check_dots(flat: Sequence[Tensor | None], lists: int, x: Sequence[Tensor]) -> None:
    gradients = check_flat(flat, lists)
    like = [next((t for t in ts if t is not None), None) for ts in zip(*gradients, strict=True)]
    check_list("x", x, like, _device(flat))


# ---- public functions


def _flatten(gradients: GradientLists, keep: Sequence[int] | None = None) -> list[Tensor | None]:
    columns = range(len(gradients[0])) if keep is None else keep
    return [
        None if tensors[n] is None else tensors[n].detach()  # type: ignore[union-attr]
        for tensors in gradients
        for n in columns
    ]


def gram(gradients: GradientLists) -> Tensor:
    """The Gram matrix of K gradients, each a list of tensors over the same parameters.

        G_ij = g_i · g_j = Σ over all parameters and elements of g_i g_j

    Every gradient is read once where it lies, without a flattened copy. Products of 32-bit and
    shorter numbers are added in float32 over at most 2048 elements and in float64 beyond; where
    their squares are beyond float32, in float64 alone. On the CPU the result is the same, bit for
    bit, in every run and for every number of threads.

    The result is a constant to autograd, whether the tensors require grad or not: use
    `mollm_ops.reference.gram_reference` for a Gram matrix with a derivative.

    Args:
        gradients: K lists of N tensors; entry n of every list has the shape of parameter n, or is
            None for a gradient of zeros. float32, float64, bfloat16 or float16, mixed as needed.

    Returns:
        float64 [K, K] on the gradients' device.

    Raises:
        ValueError: lists of different lengths, shapes or devices, or no tensor at all.
        TypeError: a sparse tensor or another dtype.
        RuntimeError: a tensor of one of torch.func's transforms, or of forward-mode autograd.

    Source: arXiv 2412.20412, section III.B.

    Example:
        >>> import torch
        >>> forget = [torch.tensor([2.0, 0.0]), torch.tensor([0.0])]
        >>> retain = [torch.tensor([-1.0, 1.0]), None]  # None: a gradient of zeros
        >>> gram([forget, retain])
        tensor([[ 4., -2.],
                [-2.,  2.]], dtype=torch.float64)
    """
    plain = _gram_plain(gradients)
    if plain is not None:
        return plain
    check_structure(gradients)
    refuse_transforms("gram", flattened(gradients))
    result: Tensor = _gram(_flatten(gradients), len(gradients))
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gram_moved(
    gradients: GradientLists,
    moving: RunningMeans | None = None,
    metric: AdamMetric | None = None,
) -> Tensor:
    """The Gram matrix of running means of the gradients, or in Adam's metric, or both.

        G_ij = Σ_e P_e m_i,e m_j,e,   P = 1 without a metric, m = g without running means

    Everything is read once.

    Args:
        gradients: K lists of N tensors or None, as for `gram`.
        moving: see `RunningMeans`.
        metric: see `AdamMetric`.

    Returns:
        float64 [K, K] on the gradients' device.

    Raises:
        ValueError: as for `gram`; a gradient without a mean; means or metric that do not match.
        TypeError: as for `gram`; a tensor without memory: this function cannot be traced.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> means = RunningMeans([[torch.zeros(2)], [torch.zeros(2)]], beta=0.5)
        >>> gram_moved([forget, retain], means)  # of half of each gradient
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """
    plain = _gram_plain(gradients, moving, metric)
    if plain is not None:
        return plain
    check_gradients(gradients)
    flat = _flatten(gradients)
    device = _device(flat)
    if moving is not None:
        check_means(gradients, moving.means, moving.beta)
    if metric is not None:
        check_metric(gradients, metric.exp_avg_sqs, metric.steps, metric.weights)
        check_range("beta2", metric.beta2, 0, 1)
        check_range("eps", metric.eps, 0)
    held = [
        *flattened(gradients),
        *(() if moving is None else flattened(moving.means)),
        *(() if metric is None else (*metric.exp_avg_sqs, *metric.steps, metric.weights)),
    ]
    refuse_transforms("gram_moved", held)
    refuse_without_memory("gram_moved", held)
    if device.type == "cpu" and _has_kernels(device, len(gradients)):
        return _gram_cpu(_contiguous(flat), len(gradients), moving, metric)
    if device.type == "cuda" and _has_kernels(device, len(gradients)):
        rows = _contiguous(flat)
        return _cuda.gram_moved(
            rows,
            _counts(rows, len(gradients)),
            len(gradients),
            None if moving is None else _contiguous(flattened(moving.means)),
            0.0 if moving is None else moving.beta,
            None
            if metric is None
            else _cuda.Moments(
                _contiguous(_where(_counts(rows, len(gradients)), metric.exp_avg_sqs)),
                metric.steps,
                metric.weights,
                metric.beta2,
                metric.eps,
            ),
        )
    return gram_moved_reference(gradients, moving, metric)


def combine(
    gradients: GradientLists,
    weights: Tensor,
    *,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """The weighted sum of K gradients, parameter by parameter.

        d_n = Σ_k w_k g_k,n

    The sum is computed in float32 (float64 where one of the tensors is) and rounded once. A
    gradient of weight 0 is not read, so an infinity in it does no harm.

    Args:
        gradients: K lists of N tensors or None, as for `gram`.
        weights: [K], any float dtype.
        out: N tensors to write to; tensor n may be tensor n of one of the lists, and shares no
            memory with any other. Default: new tensors with the dtype of the first gradient of
            each parameter.

    Returns:
        N tensors; None where no list has a gradient.

    Raises:
        ValueError: weights or out do not match the gradients, or out shares memory with itself or
            with gradients of other parameters; otherwise as for `gram`.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> combine([forget, retain], torch.tensor([0.5, 2.0]))
        [tensor([-1.,  2.])]
    """
    plain = _combine_plain(gradients, weights, out)
    if plain is not None:
        return plain
    check_structure(gradients)
    check_weights("weights", weights, len(gradients))
    like = [next((t for t in ts if t is not None), None) for ts in zip(*gradients, strict=True)]
    if out is None:
        out = [None if t is None else torch.empty_like(t) for t in like]
    elif len(out) != len(like):
        raise ValueError(f"out must have {len(like)} tensors, but got {len(out)}.")
    refuse_transforms("combine", [*flattened(gradients), *out, weights])
    keep = [n for n, t in enumerate(like) if t is not None]
    for n in keep:
        check_tensor(f"out[{n}]", out[n])
    flat = _flatten(gradients, keep)
    w = weights.detach().to(device=_device(flat), dtype=torch.float64).contiguous()
    _combine_(flat, w, [out[n] for n in keep])
    return [out[n] if t is not None else None for n, t in enumerate(like)]


def dots(gradients: GradientLists, x: Sequence[Tensor]) -> Tensor:
    """The dot product of each of K gradients with one more list of tensors, g_k · x.

    Every product and sum is in float64, so that differences of such dot products (before and after
    an update of x) keep their digits.

    Args:
        gradients: K lists of N tensors or None, as for `gram`.
        x: N tensors of the same shapes.

    Returns:
        float64 [K] on the gradients' device.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> dots([forget, retain], [torch.tensor([1.0, 1.0])])
        tensor([2., 0.], dtype=torch.float64)
    """
    plain = _dots_plain(gradients, x)
    if plain is not None:
        return plain
    check_structure(gradients)
    for n, t in enumerate(x):
        check_tensor(f"x[{n}]", t)
    refuse_transforms("dots", [*flattened(gradients), *x])
    result: Tensor = _dots(_flatten(gradients), len(gradients), [t.detach() for t in x])
    return result


def gram_direction(
    gradients: GradientLists,
    *,
    length: str = "mean",
    out: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor | None], Tensor, Solution]:
    """Gram matrix, dual-space weights and weighted sum of K gradients in one call.

        G = gram(g),  w = dual_space_weights(G),  d = Σ_k w_k g_k

    The gradients are read twice: once for G, once for d.

    Args:
        gradients: K lists of N tensors or None, as for `gram`.
        length: of d; see `dual_space_weights`.
        out: as for `combine`.

    Returns:
        (d, G, solution): d as N tensors, to be subtracted from the parameters.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> d, G, solution = gram_direction([forget, retain])
        >>> solution.status.name, (dots([forget, retain], d) > 0).tolist()  # −d descends on both
        ('DUAL', [True, True])
    """
    matrix = gram(gradients)
    solution = dual_space_weights(matrix, length=length)
    return combine(gradients, solution.weights, out=out), matrix, solution
