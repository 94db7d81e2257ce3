"""The optimizer step as defined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mollm_ops._checks import GradientLists
from mollm_ops.operands import AdamWStep, RunningMeans, SgdStep, Targets, largest_moment
from mollm_ops.reference.gram import moved_means_reference, slices


def _mix(x: Tensor) -> Tensor:
    # csrc/update.h, mix, on 32-bit numbers held as int64
    low = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def _round_stochastically(x: Tensor, seed: int, step: int, n: int, first: int, salt: int) -> Tensor:
    """float32 → bfloat16, up or down with the probabilities that make the mean exact; x begins at
    element `first` of parameter n."""
    low = 0xFFFFFFFF

    def hashed(number: int) -> int:
        return int(_mix(torch.tensor(number & low)))

    key = hashed(seed ^ hashed(seed >> 32))
    key = hashed(key + step)
    key = hashed(key ^ hashed(n + 0x9E3779B9))
    key = hashed(key + salt) if salt else key
    at = torch.arange(first, first + x.numel(), device=x.device) & low
    noise = (_mix(at ^ key) & 0xFFFF).view(x.shape)
    bits = x.float().view(torch.int32).long() & low
    up = ((bits + noise) & 0xFFFF0000).to(torch.int64)
    signed = torch.where(up >= 1 << 31, up - (1 << 32), up).to(torch.int32)
    return torch.where(x.isfinite(), signed.view(torch.float32), x.float()).bfloat16()


def update_reference(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    *,
    moving: RunningMeans | None = None,
    rounding_seed: int | None = None,
) -> Tensor:
    """The step, a slice of a parameter at a time, in float32 (float64 where a tensor is); see
    `update_`."""
    K = len(gradients)
    changes = torch.zeros(K, dtype=torch.float64, device=weights.device)
    for n, (x, t, *g) in enumerate(zip(targets.params, targets.steps, *gradients, strict=True)):
        m = None if targets.first is None else targets.first[n]
        v = None if targets.second is None else targets.second[n]
        means = [None] * K if moving is None else [row[n] for row in moving.means]
        written = [u for u in (x, m, v, *means) if u is not None]
        if x.numel() == 0:
            continue
        whole = [*g, *means, x, m, v]
        pieces = slices(whole) if all(u.is_contiguous() for u in written) else [whole]
        first = 0
        for piece in pieces:
            some, old, (x, m, v) = piece[:K], piece[K : 2 * K], piece[2 * K :]
            assert x is not None, "every parameter is there"
            rounding = None if rounding_seed is None else (rounding_seed, int(t), n, first)
            here = None if moving is None else RunningMeans([[u] for u in old], moving.beta)
            changes += _step_one(some, weights, (x, m, v), t, method, here, rounding)
            first += x.numel()
    return changes


def _step_one(
    gradients: Sequence[Tensor | None],
    weights: Tensor,
    to: tuple[Tensor, Tensor | None, Tensor | None],
    t: Tensor,
    method: SgdStep | AdamWStep,
    moving: RunningMeans | None,
    rounding: tuple[int, int, int, int] | None,
) -> Tensor:
    x, m, v = to
    used = gradients
    if moving is not None:
        used = [u for (u,) in moved_means_reference([[u] for u in gradients], moving)]
        for value, (mean,) in zip(used, moving.means, strict=True):
            if mean is not None and value is not None:
                mean.copy_(value)
    d, new = _next_state(used, weights, x, m, v, method)
    wide, rate = d.dtype, float(method.lr)
    lr: float | Tensor = rate
    divisor: float | Tensor = 1.0
    if isinstance(method, AdamWStep):
        step = t.double()
        lr = rate if m is None else rate / (1 - method.beta1**step)
        root = (1 / (1 - method.beta2**step).sqrt()).to(wide)
        divisor = new["second"].sqrt() * root + method.eps
    new["param"] = (1 - rate * method.weight_decay) * x.to(wide) - lr * (d / divisor)
    before = x.to(wide, copy=True)
    for salt, (name, target) in enumerate({"param": x, "first": m, "second": v}.items()):
        value = new.get(name)
        if target is None or value is None:
            continue
        if rounding is not None and target.dtype == torch.bfloat16:
            value = _round_stochastically(value, *rounding, salt)
        target.copy_(value)
    moved = (x.to(wide) - before).double()
    products = [moved.new_zeros(()) if u is None else (u.double() * moved).sum() for u in gradients]
    return torch.stack(products)


def _next_state(
    g: Sequence[Tensor | None],
    weights: Tensor,
    x: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    method: SgdStep | AdamWStep,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What one parameter steps along, and its next state with AdamW's Σ g²; neither rounded."""
    wide = torch.promote_types(torch.float32, _widest([u for u in (x, m, v, *g) if u is not None]))
    terms = [(w, u.to(wide)) for w, u in zip(weights.to(wide), g, strict=True) if u is not None]
    # A list of weight 0 is not read: an infinity in it is inert.
    d = sum((torch.where(w != 0, w * u, 0) for w, u in terms), torch.zeros_like(x, dtype=wide))
    new: dict[str, Tensor] = {}
    if isinstance(method, SgdStep):
        if m is not None:
            new["first"] = b = method.momentum * m.to(wide) + d
            d = d + method.momentum * b if method.nesterov else b
        return d, new
    assert v is not None, "AdamW keeps a second moment"
    square = d * d
    if method.second_weights is not None:
        pairs = zip(method.second_weights.to(wide), g, strict=True)
        square = sum((c * u.to(wide) ** 2 for c, u in pairs if u is not None), torch.zeros_like(d))
    new["square"] = square
    new["second"] = method.beta2 * v.to(wide) + (1 - method.beta2) * square
    if m is not None:
        new["first"] = d = method.beta1 * m.to(wide) + (1 - method.beta1) * d
    return d, new


def overflows(
    gradients: GradientLists,
    weights: Tensor,
    targets: Targets,
    method: SgdStep | AdamWStep,
    *,
    moving: RunningMeans | None = None,
) -> Tensor:
    """Whether the step would leave a state that its dtype cannot hold, as a scalar on the device.

    Reads everything that the step reads, in plain Torch, and writes nothing.
    """
    over = torch.zeros((), dtype=torch.bool, device=weights.device)
    rows = gradients if moving is None else moved_means_reference(gradients, moving)
    for n, (x, *g) in enumerate(zip(targets.params, *rows, strict=True)):
        m = None if targets.first is None else targets.first[n]
        v = None if targets.second is None else targets.second[n]
        d, new = _next_state(g, weights, x, m, v, method)
        kept = {"first": m, "second": v}
        for name, value in new.items():
            to = kept.get(name)
            # The sum of squares is computed, though never kept.
            limit = largest_moment(d.dtype if to is None else to.dtype)
            over |= ~(value.abs() <= limit).all()
    return over


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
