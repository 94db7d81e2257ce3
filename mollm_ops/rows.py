"""Row kernels: from rows of logits to per-token losses and, in place, their gradients.

Every loss here is a function of one row z of logits. With m = max z, e_j = exp(z_j - m),
S = Σ_{j≠t} e_j and Z = S + e_t,

    cross-entropy  L = log(1 + S / e_t)        ∂L/∂z_j = e_j / Z        ∂L/∂z_t = -S / Z
    UCE            L = log(1 + s)              ∂L/∂z_j = -s e_j / Z     ∂L/∂z_t = s S / Z
                   s = (1 - ε) e_t / (S + ε e_t)
    KL(ref || .)   L = Σ_j p_ref_j φ(log p_ref_j - log p_j),  φ(d) = exp(-d) + d - 1 >= 0
                                               ∂L/∂z_j = p_j - p_ref_j

Nothing is ever computed as 1 - p: at p close to 1 that has no correct digit, S / Z has all of them.

What a head returns may be z₀ with z = c tanh(s z₀ / c), or s z₀ without a cap c. Kernels then read
z₀ and write gradients with respect to it. With a = |s z₀| / c, u = exp(-2a) and w = -expm1(-2a):

    |z| = c w / (2 - w),   ∂z/∂z₀ = s (1 - (z/c)²) = s · 4u / (2 - w)²,

since 1 - (z/c)² has no digits left near saturation, and u has all of them.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from mollm_ops._dtypes import name_of, wide_dtype
from mollm_ops._extension import DTYPE_CODES, address, extension, has_kernels_for
from mollm_ops.operands import IDENTITY, LogitTransform, RowLoss

HAS_TRITON = find_spec("triton") is not None


def log_rows(
    logits: Tensor,  # [R, V]
    target: Tensor,  # [R] int64
    ce: RowLoss,
    eps: float | None = None,
    transform: LogitTransform = IDENTITY,
) -> None:
    """Cross-entropy, or UCE where eps is given, of every row.

    A negative target stands for a row that does not count: loss 0, gradient 0. A target of V or
    more is an error that a GPU cannot raise without a synchronisation: loss NaN, gradient 0.
    """
    _rows(logits, None, target, ce, None, eps, transform, IDENTITY)


def kl_rows(
    logits: Tensor,  # [R, V]
    ref_logits: Tensor,  # [R, V]
    target: Tensor,  # [R] int64
    kl: RowLoss,
    ce: RowLoss | None = None,
    *,
    transform: LogitTransform = IDENTITY,
    ref_transform: LogitTransform = IDENTITY,
) -> None:
    """KL(softmax(ref_logits) || softmax(logits)) of every row and, where asked, its cross-entropy.

    A row counts unless its target is negative. Both gradients come from one read of the rows.
    """
    _rows(logits, ref_logits, target, ce, kl, None, transform, ref_transform)


def _rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    target: Tensor,
    ce: RowLoss | None,
    kl: RowLoss | None,
    eps: float | None,
    transform: LogitTransform,
    ref_transform: LogitTransform,
) -> None:
    _check(logits, ref_logits, target, *(to for to in (ce, kl) if to is not None))
    if logits.device.type == "cpu" and has_kernels_for(logits.device):
        compute = _cpu_rows
    elif logits.device.type == "cuda" and logits.dtype != torch.float64 and HAS_TRITON:
        compute = _triton_rows
    else:
        compute = _torch_rows
    compute(logits, ref_logits, target, ce, kl, eps, transform, ref_transform)


def _check(logits: Tensor, ref_logits: Tensor | None, target: Tensor, *losses: RowLoss) -> None:
    """All that the kernels rely on when they take a pointer."""
    R, wide = logits.shape[0], wide_dtype(logits.dtype)
    narrow = (torch.bfloat16, torch.float16) if logits.dtype == torch.float32 else ()
    wanted: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = []
    wanted.append(("target", target, (R,), (torch.int64,)))
    if ref_logits is not None:
        wanted.append(("ref_logits", ref_logits, tuple(logits.shape), (logits.dtype,)))
    for to in losses:
        wanted += [("losses", to.losses, (R,), (wide,)), ("scale", to.scale, (R,), (wide,))]
        if to.gradient is not None:
            dtypes = logits.dtype, *narrow
            wanted.append(("gradient", to.gradient, tuple(logits.shape), dtypes))
    for name, tensor, shape, dtypes in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, but got {list(tensor.shape)}.")
        if tensor.dtype not in dtypes:
            known = " or ".join(map(name_of, dtypes))
            raise TypeError(f"{name} must be {known}, but got {name_of(tensor.dtype)}.")
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device}, but got {tensor.device}.")
        written = name == "losses" or name == "gradient"
        if written and tensor.numel() > 0 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must have contiguous rows, but got stride {tensor.stride()}.")

    written_as = sorted({name_of(to.gradient.dtype) for to in losses if to.gradient is not None})
    if len(written_as) > 1:
        raise TypeError(f"gradients must have one dtype, but got {' and '.join(written_as)}.")


def row_targets(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """target as the row kernels take it; out of range is an error on the CPU and `vocab` beyond."""
    ignored = target == ignore_index
    unknown = ((target < 0) | (target >= vocab)) & ~ignored
    if target.device.type == "cpu" and bool(unknown.any()):
        raise ValueError(
            f"target must be in [0, {vocab}) or ignore_index {ignore_index}, "
            f"but got {int(target[unknown][0])}."
        )
    return torch.where(ignored, -1, torch.where(unknown, vocab, target))


def refuse_double_backward() -> None:
    """Called in backward: the gradients returned there are constants to autograd."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph must be False in a backward through mollm_ops losses: their second "
            "derivative is not implemented; use the functions of mollm_ops.reference for it."
        )


# ---- C++: one vectorised pass over each row while it is in cache


def _cpu_rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    target: Tensor,
    ce: RowLoss | None,
    kl: RowLoss | None,
    eps: float | None,
    transform: LogitTransform,
    ref_transform: LogitTransform,
) -> None:
    assert extension is not None, "has_kernels_for(cpu) implies the extension"
    gradients = [to.gradient for to in (ce, kl) if to is not None and to.gradient is not None]
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if ref_logits is not None and ref_logits.stride(1) != 1:
        ref_logits = ref_logits.contiguous()
    target = target.contiguous()
    extension.rows_cpu(
        rows=logits.shape[0],
        vocab=logits.shape[1],
        dtype=DTYPE_CODES[logits.dtype],
        gradient_dtype=DTYPE_CODES[gradients[0].dtype if gradients else logits.dtype],
        logits=address("logits", logits),
        stride=logits.stride(0),
        reference=0 if ref_logits is None else address("ref_logits", ref_logits),
        reference_stride=0 if ref_logits is None else ref_logits.stride(0),
        target=address("target", target),
        eps=0.0 if eps is None else eps,
        ce=_addresses(ce),
        kl=_addresses(kl),
        map=(transform.scale, transform.softcap or 0.0),
        reference_map=(ref_transform.scale, ref_transform.softcap or 0.0),
        threads=torch.get_num_threads(),
    )


def _addresses(to: RowLoss | None) -> tuple[int, int, int, int, int] | None:
    if to is None:
        return None
    gradient = 0, 0
    if to.gradient is not None:
        gradient = address("gradient", to.gradient), to.gradient.stride(0)
    return address("scale", to.scale), to.scale.stride(0), address("losses", to.losses), *gradient


# ---- Triton: two sweeps, one read and one write of memory


def _triton_rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    target: Tensor,
    ce: RowLoss | None,
    kl: RowLoss | None,
    eps: float | None,
    transform: LogitTransform,
    ref_transform: LogitTransform,
) -> None:
    from mollm_ops._rows_triton import kl_rows_triton, log_rows_triton

    if len(logits) == 0:
        return
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    target = target.contiguous()
    if ref_logits is None:
        assert ce is not None, "without a reference there is only this loss"
        log_rows_triton(logits, target, ce, eps, transform)
    else:
        assert kl is not None, "a reference is given for KL"
        ref_logits = ref_logits if ref_logits.stride(1) == 1 else ref_logits.contiguous()
        kl_rows_triton(logits, ref_logits, target, kl, ce, transform, ref_transform)


# ---- plain Torch: any device and dtype


def _torch_rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    target: Tensor,
    ce: RowLoss | None,
    kl: RowLoss | None,
    eps: float | None,
    transform: LogitTransform,
    ref_transform: LogitTransform,
) -> None:
    wide = (kl or ce).losses.dtype  # type: ignore[union-attr]
    counted, known = target >= 0, target < logits.shape[1]
    at = target.clamp(0, logits.shape[1] - 1)[:, None]
    z, slope = transformed(logits.to(wide), transform)
    z, e, e_t, S = _sums(z, at)
    results = []
    if kl is not None:
        assert ref_logits is not None, "KL needs the reference's logits"
        # Both rows are summed alike: KL and its gradient are exactly 0 where they are equal.
        z_ref, e_ref, e_ref_t, S_ref = _sums(transformed(ref_logits.to(wide), ref_transform)[0], at)
        Z, Z_ref = S + e_t, S_ref + e_ref_t
        p, p_ref = e / Z, e_ref / Z_ref
        d = (z_ref - z) - (Z_ref.log() - Z.log())
        # exp(-d) may overflow where p = p_ref exp(-d) does not.
        terms = torch.where(d.abs() < 0.25, p_ref * _phi(d), p - p_ref + p_ref * d)
        results.append((kl, torch.where(p_ref == 0, p, terms).sum(1), p - p_ref))
    if ce is not None:
        results.append((ce, *_log_loss(z, e, e_t, S, at, eps)))
    for to, loss, gradient in results:
        loss = torch.where(known, loss, torch.nan)
        to.losses.copy_(torch.where(counted, loss, 0))
        if to.gradient is not None:
            uses = (counted & known)[:, None]
            to.gradient.copy_(torch.where(uses, gradient * slope * to.scale[:, None], 0))


def transformed(z: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """Logits, in memory of their own, and their derivative by z."""
    z, c = transform.scale * z, transform.softcap
    if c is None:
        return z, transform.scale
    u, w = (-2 / c * z.abs()).exp(), -(-2 / c * z.abs()).expm1()
    return (c * (w / (2 - w))).copysign(z), transform.scale * 4 * u / (2 - w).square()


def _sums(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z - m, its exponentials e, e_t [R, 1] and S [R, 1]."""
    z = z - z.amax(1, keepdim=True)
    e = z.exp()
    return z, e, e.gather(1, at), e.scatter(1, at, 0).sum(1, keepdim=True)


def _log_loss(
    z: Tensor, e: Tensor, e_t: Tensor, S: Tensor, at: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    Z = S + e_t
    if eps is None:
        z_t = z.gather(1, at)
        loss = torch.where(z_t > -30, torch.log1p(S / e_t), Z.log() - z_t)
        return loss[:, 0], (e / Z).scatter(1, at, -S / Z)
    s = (1 - eps) * e_t / (S + eps * e_t)
    return torch.log1p(s)[:, 0], (-s * e / Z).scatter(1, at, s * S / Z)


def _phi(d: Tensor) -> Tensor:
    """exp(-d) + d - 1, |d| < 1/4, without cancellation, so that a KL is never negative."""
    series = torch.zeros_like(d)
    for k in range(14, 1, -1):  # Σ_k (-d)^k / k!, k = 2 ... 14: all digits of float64 at 1/4
        series = series * -d + 1 / math.factorial(k)
    return d * d * series
