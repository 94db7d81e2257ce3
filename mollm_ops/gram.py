"""The Gram matrix of K gradients, their weighted sum, and both around the dual-space solver."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from mollm_ops import _cuda
from mollm_ops._checks import GradientLists, check_dtype, check_gradients, check_means
from mollm_ops._extension import (
    MAX_OBJECTIVES,
    addresses,
    dtype_codes,
    extension,
    has_kernels_for,
    listed,
)
from mollm_ops.dual_space import Solution, dual_space_weights
from mollm_ops.operands import AdamMetric, RunningMeans
from mollm_ops.reference.gram import (
    combine_reference,
    gram_reference,
    moved_means_reference,
    scaled_by_metric_reference,
    slices,
)

# ---- kernels and Torch's view of them


def _contiguous(flat: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in flat]


def _counts(flat: Sequence[Tensor | None], lists: int) -> list[int]:
    tensors = len(flat) // lists
    columns = (flat[n::tensors] for n in range(tensors))
    return [next((t.numel() for t in column if t is not None), 0) for column in columns]


def _lists(flat: Sequence[Tensor | None], lists: int) -> list[Sequence[Tensor | None]]:
    tensors = len(flat) // lists
    return [flat[k * tensors : (k + 1) * tensors] for k in range(lists)]


def _has_kernels(device: torch.device, lists: int) -> bool:
    return has_kernels_for(device) and (device.type == "cpu" or lists <= MAX_OBJECTIVES)


def _device(flat: Sequence[Tensor | None]) -> torch.device:
    return next(t.device for t in flat if t is not None)


@torch.library.custom_op("mollm::gram", mutates_args=())
def _gram(flat: Sequence[Tensor | None], lists: int) -> Tensor:
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
    out = torch.zeros(lists, lists, dtype=torch.float64)
    means = [] if moving is None else _contiguous([t for ts in moving.means for t in ts])
    moments = [] if metric is None else _contiguous(metric.exp_avg_sqs)
    extension.gram_cpu(
        data=addresses(rows),
        dtypes=dtype_codes(rows),
        counts=_counts(rows, lists),
        means=moving and (listed(means), moving.beta),
        metric=metric
        and (
            listed(moments),
            [1 - metric.beta2 ** (float(step) + 1) for step in metric.steps],
            metric.weights.tolist(),
            metric.beta2,
            metric.eps,
        ),
        gram=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


@_gram.register_fake
def _(flat: Sequence[Tensor | None], lists: int) -> Tensor:
    return torch.empty(lists, lists, dtype=torch.float64, device=_device(flat))


@torch.library.custom_op("mollm::combine_", mutates_args=("out",))
def _combine_(flat: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    lists = weights.numel()
    device = _device(flat)
    rows = _contiguous(flat)
    if not _has_kernels(device, lists):
        _combine_without_extension(_lists(rows, lists), weights, out)
        return
    targets = [t.contiguous() for t in out]
    if device.type == "cuda":
        _cuda.combine(rows, _counts(rows, lists), weights, targets)
    else:
        assert extension is not None, "_has_kernels implies the extension"
        extension.combine_cpu(
            data=addresses(rows),
            dtypes=dtype_codes(rows),
            counts=_counts(rows, lists),
            weights=weights.data_ptr(),
            out=addresses(targets),
            out_dtypes=dtype_codes(targets),
            threads=torch.get_num_threads(),
        )
    for to, value in zip(out, targets, strict=True):
        if value.data_ptr() != to.data_ptr():
            to.copy_(value)


@torch.library.custom_op("mollm::dots", mutates_args=())
def _dots(flat: Sequence[Tensor | None], lists: int, x: Sequence[Tensor]) -> Tensor:
    device = _device(flat)
    if device.type != "cpu" or not has_kernels_for(device):
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
    out = torch.zeros(lists, dtype=torch.float64)
    extension.dots_cpu(
        data=addresses(rows),
        dtypes=dtype_codes(rows),
        counts=_counts(rows, lists),
        x=addresses(column),
        x_dtypes=dtype_codes(column),
        dots=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


@_dots.register_fake
def _(flat: Sequence[Tensor | None], lists: int, x: Sequence[Tensor]) -> Tensor:
    return torch.empty(lists, dtype=torch.float64, device=_device(flat))


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
    shorter numbers are added in float32 over at most 2048 elements and in float64 beyond. On the
    CPU the result is the same, bit for bit, in every run and for every number of threads.

    Args:
        gradients: K lists of N tensors; entry n of every list has the shape of parameter n, or is
            None for a gradient of zeros. float32, float64, bfloat16 or float16, mixed as needed.

    Returns:
        float64 [K, K] on the gradients' device.

    Raises:
        ValueError: lists of different lengths, shapes or devices, or no tensor at all.
        TypeError: a sparse tensor or another dtype.

    Source: arXiv 2412.20412, section III.B.

    Example:
        >>> import torch
        >>> forget = [torch.tensor([2.0, 0.0]), torch.tensor([0.0])]
        >>> retain = [torch.tensor([-1.0, 1.0]), None]  # None: a gradient of zeros
        >>> gram([forget, retain])
        tensor([[ 4., -2.],
                [-2.,  2.]], dtype=torch.float64)
    """
    check_gradients(gradients)
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
        ValueError: as for `gram`; a gradient without a mean.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> means = RunningMeans([[torch.zeros(2)], [torch.zeros(2)]], beta=0.5)
        >>> gram_moved([forget, retain], means)  # of half of each gradient
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """
    check_gradients(gradients)
    flat = _flatten(gradients)
    if moving is not None:
        check_means(gradients, moving.means)
    device = _device(flat)
    if device.type == "cpu" and _has_kernels(device, len(gradients)):
        return _gram_cpu(_contiguous(flat), len(gradients), moving, metric)
    if device.type == "cuda" and _has_kernels(device, len(gradients)):
        rows = _contiguous(flat)
        return _cuda.gram_moved(
            rows,
            _counts(rows, len(gradients)),
            len(gradients),
            None if moving is None else [t for tensors in moving.means for t in tensors],
            0.0 if moving is None else moving.beta,
            None
            if metric is None
            else _cuda.Moments(
                _contiguous(metric.exp_avg_sqs),
                metric.steps,
                metric.weights,
                metric.beta2,
                metric.eps,
            ),
        )
    if moving is not None:
        gradients = moved_means_reference(gradients, moving)
    if metric is not None:
        gradients = scaled_by_metric_reference(gradients, metric)
    return gram(gradients)


def _check_weights(gradients: GradientLists, weights: Tensor) -> Tensor:
    if weights.shape != (len(gradients),):
        raise ValueError(
            f"weights must have one entry per list of gradients ({len(gradients)}), "
            f"but got shape {tuple(weights.shape)}."
        )
    flat = next(t for tensors in gradients for t in tensors if t is not None)
    return weights.detach().to(device=flat.device, dtype=torch.float64).contiguous()


def _check_out(out: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> None:
    if len(out) != len(like):
        raise ValueError(f"out must have {len(like)} tensors, but got {len(out)}.")
    for n, (to, expected) in enumerate(zip(out, like, strict=True)):
        if expected is None:
            continue
        if to is None or to.shape != expected.shape or to.device != expected.device:
            got = "None" if to is None else f"{tuple(to.shape)} on {to.device}"
            raise ValueError(
                f"out[{n}] must have shape {tuple(expected.shape)} on {expected.device}, "
                f"but got {got}."
            )
        check_dtype(f"out[{n}]", to)


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
        out: N tensors to write to; may be one of the lists. Default: new tensors with the dtype of
            the first gradient of each parameter.

    Returns:
        N tensors; None where no list has a gradient.

    Raises:
        ValueError: weights or out do not match the gradients; otherwise as for `gram`.

    Example:
        >>> import torch
        >>> forget, retain = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> combine([forget, retain], torch.tensor([0.5, 2.0]))
        [tensor([-1.,  2.])]
    """
    check_gradients(gradients)
    weights = _check_weights(gradients, weights)
    like = [next((t for t in ts if t is not None), None) for ts in zip(*gradients, strict=True)]
    if out is None:
        out = [None if t is None else torch.empty_like(t) for t in like]
    _check_out(out, like)
    keep = [n for n, t in enumerate(like) if t is not None]
    _combine_(_flatten(gradients, keep), weights, [out[n] for n in keep])
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
    check_gradients([*gradients, x])
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
