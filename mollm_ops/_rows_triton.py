"""The row kernels in Triton; see `mollm_ops.rows` for the equations.

A row of 128256 logits fits no multiprocessor, so a program sweeps it twice: once for its maximum
and sum, once for its gradient. One program per multiprocessor keeps the rows in flight (32 MiB of
16-bit logits) in the L2 cache for the second sweep, so that memory sees one read and one write. Of
float32 logits (65 MiB, for KL 129 MiB) it sees two reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mollm_ops.operands import LogitTransform, RowLoss

MAX_BLOCK = 8192
MAX_KL_BLOCK = 4096  # of rows in float32
KL_REGISTERS = 112  # a thread; left alone, ptxas takes 64 here, and spills
_EACH = 8
_LOG2_E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    BLOCK: int
    num_warps: int


def config_of(vocab: int, most: int = MAX_BLOCK) -> Config:
    """The shipped configurations: 8 logits a thread, and up to 32 warps, or 16 for KL.

    With more logits, two blocks on their way do not fit into a thread's registers.
    """
    block = min(most, max(128, triton.next_power_of_2(vocab)))
    return Config(block, max(1, block // (32 * _EACH)))


# ---- kernels


@triton.jit
def _log1p(u):
    """log(1 + u), u >= 0, to float32's last digits where 1 + u has lost u's."""
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u / 5))))
    return tl.where(u < 0.03, series, tl.log(1 + u))


@triton.jit
def _logits(z, scale, cap, HAS_CAP: tl.constexpr):
    """s z, or c tanh(s z / c)."""
    z = z.to(tl.float32) * scale
    if HAS_CAP:
        a = tl.abs(z) / cap
        u = tl.exp(-2 * a)
        s = a * a  # near 0 the quotient has lost a's digits
        series = a * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
        tanh = tl.where(a < 0.25, series, (1 - u) / (1 + u))
        return tl.where(z < 0, -cap, cap) * tanh
    else:
        return z


@triton.jit
def _slope(z, scale, cap, HAS_CAP: tl.constexpr):
    """∂ logits / ∂z: 1 - tanh² has no digits near saturation, 4u / (1 + u)² has."""
    if HAS_CAP:
        a = tl.abs(z.to(tl.float32) * scale) / cap
        u = tl.exp(-2 * a)  # written as in _logits, so that the compiler computes it once
        return scale * (4 * u / ((1 + u) * (1 + u)))
    else:
        return scale


@triton.jit
def _value(z, scale, cap, HAS_CAP: tl.constexpr):
    """What a sweep works with: the logits if they are capped, else z alone."""
    if HAS_CAP:
        return _logits(z, scale, cap, True)
    else:
        return z.to(tl.float32)


@triton.jit
def _unit(scale, HAS_CAP: tl.constexpr):
    """Logits are values times this."""
    if HAS_CAP:
        return 1.0
    else:
        return scale


@triton.jit
def _block(row, j, V):
    return tl.load(row + j, mask=j < V, other=-float("inf"), eviction_policy="evict_last")


@triton.jit
def _last_block(row, j, V):
    """Of a sweep after which nobody reads the row."""
    return tl.load(row + j, mask=j < V, other=0.0, eviction_policy="evict_first")


@triton.jit
def _add_block(tops, sums, z, j, t, V, scale, cap, unit, HAS_CAP: tl.constexpr):
    v = _value(z, scale, cap, HAS_CAP)
    if HAS_CAP:
        v = tl.where(j < V, v, -float("inf"))
    v = tl.where(j == t, -float("inf"), v)
    new = tl.maximum(tops, tl.max(v, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf would be NaN
    e = tl.exp2((v - shift[:, None]) * unit)
    return new, sums * tl.exp2((tops - shift) * unit) + tl.sum(e, 1)


@triton.jit
def _maximum_and_sum(row, t, V, scale, cap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """m = max v, x = z_t - max z and S = Σ_{j≠t} exp(z_j - max z), of values v and logits z.

    Two blocks take turns: while one is added, the other is on its way. The sixteen bytes that a
    thread loads at once have a maximum and a sum of their own, so that no thread waits for another
    before the row's end.
    """
    WIDE: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    unit = _LOG2_E * _unit(scale, HAS_CAP)
    tops = tl.full((BLOCK // WIDE,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK // WIDE,), tl.float32)
    j = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    even, odd = _block(row, j, V), _block(row + BLOCK, j, V - BLOCK)
    for begin in range(0, V, 2 * BLOCK):
        at, left = row + begin, V - begin
        tops, sums = _add_block(tops, sums, even, j, t - begin, left, scale, cap, unit, HAS_CAP)
        even = _block(at + 2 * BLOCK, j, left - 2 * BLOCK)
        at, left, t_odd = at + BLOCK, left - BLOCK, t - begin - BLOCK
        tops, sums = _add_block(tops, sums, odd, j, t_odd, left, scale, cap, unit, HAS_CAP)
        odd = _block(at + 2 * BLOCK, j, left - 2 * BLOCK)
    v_t = _value(tl.load(row + t), scale, cap, HAS_CAP)
    m = tl.maximum(tl.max(tops, 0), v_t)
    lower = tl.where(tops == -float("inf"), -float("inf"), tops - m)
    return m, (v_t - m) * _unit(scale, HAS_CAP), tl.sum(sums * tl.exp2(lower * unit), 0)


@triton.jit
def _log_loss(x, S, eps, rest, HAS_EPS: tl.constexpr):
    """L, and ∂L/∂z as factors: of exp(z_j - m) for j != t, and alone for t."""
    e_t = tl.exp(x)
    Z = S + e_t
    if HAS_EPS:
        s = rest * e_t / (S + eps * e_t)
        return _log1p(s), -s / Z, s * (S / Z)
    else:
        # Below -30 the 1 of 1 + S / e_t has no digit left, and e_t may be zero.
        ratio = S / tl.where(x > -30, e_t, 1.0)
        return tl.where(x > -30, _log1p(ratio), tl.log(Z) - x), 1 / Z, -(S / Z)


@triton.jit
def _zero_row(row, V, BLOCK: tl.constexpr):
    for begin in range(0, V, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        tl.store(row + j, tl.zeros((BLOCK,), row.dtype.element_ty), mask=j < V)


@triton.jit
def log_rows_kernel(
    logits,  # [R, V]
    target,  # [R]
    losses,  # [R]
    scale,  # [R]
    gradient,  # [R, V]; may be logits
    stride,
    scale_stride,
    gradient_stride,
    R,
    V,
    logit_scale,
    softcap,
    eps,
    rest,  # 1 - eps, rounded once
    HAS_CAP: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    for r in range(tl.program_id(0), R, tl.num_programs(0)):
        n = tl.cast(r, tl.int64)
        label = tl.load(target + n)
        out = gradient + n * gradient_stride
        if (label < 0) | (label >= V):
            tl.store(losses + n, tl.where(label < 0, 0.0, float("nan")))
            if HAS_GRADIENT:
                _zero_row(out, V, BLOCK)
        else:
            row, t = logits + n * stride, tl.cast(label, tl.int32)
            m, x, S = _maximum_and_sum(row, t, V, logit_scale, softcap, HAS_CAP, BLOCK)
            loss, at_others, at_target = _log_loss(x, S, eps, rest, HAS_EPS)
            tl.store(losses + n, loss)
            if HAS_GRADIENT:
                unit = _LOG2_E * _unit(logit_scale, HAS_CAP)
                c = tl.load(scale + n * scale_stride)
                if not HAS_CAP:
                    c *= logit_scale
                at_others, at_target = at_others * c, at_target * c
                for begin in range(0, V, BLOCK):
                    j = begin + tl.arange(0, BLOCK)
                    z = _last_block(row, j, V)
                    g = at_others * tl.exp2((_value(z, logit_scale, softcap, HAS_CAP) - m) * unit)
                    if (t >= begin) & (t < begin + BLOCK):
                        g = tl.where(j == t, at_target, g)
                    if HAS_CAP:
                        g *= _slope(z, logit_scale, softcap, True)
                    if NARROW:
                        # As in kl_rows_kernel: other threads read the logits under this block.
                        tl.debug_barrier()
                    tl.store(out + j, g.to(out.dtype.element_ty), mask=j < V)


@triton.jit
def kl_rows_kernel(
    logits,  # [R, V]
    ref_logits,  # [R, V]
    target,  # [R]
    kl_losses,  # [R]
    kl_scale,  # [R]
    kl_gradient,  # [R, V]; may begin where a row of logits or ref_logits does
    ce_losses,  # [R]
    ce_scale,  # [R]
    ce_gradient,  # [R, V]; may begin where a row of logits or ref_logits does
    stride,
    ref_stride,
    kl_scale_stride,
    kl_gradient_stride,
    ce_scale_stride,
    ce_gradient_stride,
    R,
    V,
    logit_scale,
    softcap,
    ref_logit_scale,
    ref_softcap,
    HAS_CAP: tl.constexpr,
    HAS_REF_CAP: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_KL_GRADIENT: tl.constexpr,
    HAS_CE_GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    for r in range(tl.program_id(0), R, tl.num_programs(0)):
        n = tl.cast(r, tl.int64)
        label = tl.load(target + n)
        kl_out, ce_out = kl_gradient + n * kl_gradient_stride, ce_gradient + n * ce_gradient_stride
        if (label < 0) | (label >= V):
            loss = tl.where(label < 0, 0.0, float("nan"))
            tl.store(kl_losses + n, loss)
            if HAS_KL_GRADIENT:
                _zero_row(kl_out, V, BLOCK)
            if HAS_CE:
                tl.store(ce_losses + n, loss)
            if HAS_CE_GRADIENT:
                _zero_row(ce_out, V, BLOCK)
        else:
            row, ref_row = logits + n * stride, ref_logits + n * ref_stride
            t = tl.cast(label, tl.int32)
            m, x, S = _maximum_and_sum(row, t, V, logit_scale, softcap, HAS_CAP, BLOCK)
            m_ref, x_ref, S_ref = _maximum_and_sum(
                ref_row, t, V, ref_logit_scale, ref_softcap, HAS_REF_CAP, BLOCK
            )
            Z, Z_ref = S + tl.exp(x), S_ref + tl.exp(x_ref)
            log_ratio = tl.log(Z_ref) - tl.log(Z)
            loss, at_others, at_target = _log_loss(x, S, 0.0, 1.0, False)
            kl_c, ce_c = tl.load(kl_scale + n * kl_scale_stride), 0.0
            if HAS_CE:
                tl.store(ce_losses + n, loss)
                ce_c = tl.load(ce_scale + n * ce_scale_stride)
            unit, ref_unit = _unit(logit_scale, HAS_CAP), _unit(ref_logit_scale, HAS_REF_CAP)
            sums = tl.zeros((BLOCK,), tl.float32)
            j = tl.arange(0, BLOCK)
            next_z, next_ref = _last_block(row, j, V), _last_block(ref_row, j, V)
            for begin in range(0, V, BLOCK):
                z, z_ref = next_z, next_ref
                j = begin + tl.arange(0, BLOCK)
                next_z = _last_block(row, j + BLOCK, V)
                next_ref = _last_block(ref_row, j + BLOCK, V)
                a = (_value(z, logit_scale, softcap, HAS_CAP) - m) * unit
                b = (_value(z_ref, ref_logit_scale, ref_softcap, HAS_REF_CAP) - m_ref) * ref_unit
                e = tl.exp(a)
                p, p_ref = e / Z, tl.exp(b) / Z_ref
                d = (b - a) - log_ratio
                phi = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
                term = tl.where(tl.abs(d) < 0.25, p_ref * phi, p - p_ref + p_ref * d)
                sums += tl.where(j < V, tl.where(p_ref == 0, p, term), 0.0)
                slope = _slope(z, logit_scale, softcap, HAS_CAP)
                if NARROW:
                    # Shorter gradients of this block lie over logits that other threads read.
                    tl.debug_barrier()
                if HAS_KL_GRADIENT:
                    g = (p - p_ref) * kl_c * slope
                    tl.store(kl_out + j, g.to(kl_out.dtype.element_ty), mask=j < V)
                if HAS_CE_GRADIENT:
                    g = tl.where(j == t, at_target, at_others * e) * ce_c * slope
                    tl.store(ce_out + j, g.to(ce_out.dtype.element_ty), mask=j < V)
            tl.store(kl_losses + n, tl.sum(sums, 0))


# ---- launchers


def _programs(logits: Tensor) -> int:
    if logits.device.type != "cuda":  # Triton's interpreter
        return min(3, logits.shape[0])
    properties = torch.cuda.get_device_properties(logits.device)
    return min(properties.multi_processor_count, logits.shape[0])


def log_rows_triton(
    logits: Tensor, target: Tensor, ce: RowLoss, eps: float | None, transform: LogitTransform
) -> None:
    config = config_of(logits.shape[1])
    with _device_of(logits):
        log_rows_kernel[(_programs(logits),)](
            logits,
            target,
            ce.losses,
            ce.scale,
            logits if ce.gradient is None else ce.gradient,
            logits.stride(0),
            ce.scale.stride(0),
            0 if ce.gradient is None else ce.gradient.stride(0),
            *logits.shape,
            transform.scale,
            transform.softcap or 1.0,
            0.0 if eps is None else eps,
            1.0 if eps is None else 1 - eps,
            HAS_CAP=transform.softcap is not None,
            HAS_EPS=eps is not None,
            HAS_GRADIENT=ce.gradient is not None,
            NARROW=ce.gradient is not None and ce.gradient.dtype != logits.dtype,
            BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )


def kl_rows_triton(
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor,
    kl: RowLoss,
    ce: RowLoss | None,
    transform: LogitTransform,
    ref_transform: LogitTransform,
) -> None:
    config = config_of(logits.shape[1], MAX_KL_BLOCK)
    other = kl if ce is None else ce
    written = [to.gradient for to in (kl, other) if to.gradient is not None]
    with _device_of(logits):
        kl_rows_kernel[(_programs(logits),)](
            logits,
            ref_logits,
            target,
            kl.losses,
            kl.scale,
            logits if kl.gradient is None else kl.gradient,
            other.losses,
            other.scale,
            logits if other.gradient is None else other.gradient,
            logits.stride(0),
            ref_logits.stride(0),
            kl.scale.stride(0),
            0 if kl.gradient is None else kl.gradient.stride(0),
            other.scale.stride(0),
            0 if other.gradient is None else other.gradient.stride(0),
            *logits.shape,
            transform.scale,
            transform.softcap or 1.0,
            ref_transform.scale,
            ref_transform.softcap or 1.0,
            HAS_CAP=transform.softcap is not None,
            HAS_REF_CAP=ref_transform.softcap is not None,
            HAS_CE=ce is not None,
            HAS_KL_GRADIENT=kl.gradient is not None,
            HAS_CE_GRADIENT=ce is not None and ce.gradient is not None,
            NARROW=any(g.dtype != logits.dtype for g in written),
            BLOCK=config.BLOCK,
            num_warps=config.num_warps,
            maxnreg=KL_REGISTERS,
        )


def _device_of(logits: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()
