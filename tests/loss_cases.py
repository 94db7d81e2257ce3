"""Shared by the tests of the losses: inputs, float64 truth, errors, allocations."""

from __future__ import annotations

import mpmath
import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
IGNORED = -100


def inputs(rows, width, vocab, dtype=torch.float32, *, scale=1.0, device="cpu", ignored=0.25):
    """hidden [rows, width], weight [vocab, width], target [rows] with first and last of the range.

    Logits have a standard deviation of `scale`.
    """
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * scale / width**0.5).to(dtype)
    target = torch.randint(0, vocab, (rows,), device=device)
    target[torch.rand(rows, device=device) < ignored] = IGNORED
    target[:1] = 0
    target[-1:] = vocab - 1
    return hidden, weight, target


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def loss_and_gradients(f, tensors, upstream=None):
    """f(*tensors), and its gradients with respect to all of them."""
    own = leaves(*tensors)
    out = f(*own)
    gradients = torch.autograd.grad(out, own, upstream)
    return [out.detach(), *gradients]


def error(got, exact):
    """The largest error, as a share of the largest exact element.

    Half a unit of a 16-bit dtype's smallest numbers is no error: it cannot be written otherwise.
    """
    exact = exact.double()
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    unit = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    off = (got.double() - exact).abs() - unit / 2
    return float(off.clamp(min=0).max() / exact.abs().max().clamp(min=1e-30))


def exact_uce(logits, target, eps):
    """The mean loss of the counted rows and its gradient, float64, from the sums S of math.

    The reference's own gradient, a difference of two softmaxes by autograd, has lost its digits
    where 1 - p is small; this one agrees with `exact_row`.
    """
    z = logits.double().reshape(-1, logits.shape[-1])
    t = target.reshape(-1)
    counted = (t != IGNORED)[:, None]
    at = torch.nn.functional.one_hot(t.clamp(min=0), z.shape[1]).bool()
    e = (z - z.amax(1, keepdim=True)).exp()
    e_t, S = (e * at).sum(1, keepdim=True), (e * ~at).sum(1, keepdim=True)
    s = (1 - eps) * e_t / (S + eps * e_t)
    gradient = torch.where(at, s * S, -s * e) / (S + e_t)
    n = counted.sum().clamp(min=1)
    loss = (torch.log1p(s) * counted).sum() / n
    return [loss, (gradient * counted / n).reshape(logits.shape)]


def exact_row(logits, target, eps):
    """(loss, gradient) of one row to 60 digits: cross-entropy, or UCE where eps is given."""
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(v)) for v in logits]
        e = [mpmath.exp(v - max(z)) for v in z]
        p = [v / mpmath.fsum(e) for v in e]
        if eps is None:
            gradient = [p_j - (j == target) for j, p_j in enumerate(p)]
            return float(-mpmath.log(p[target])), [float(g) for g in gradient]
        eps = mpmath.mpf(eps)
        s = (1 - eps) * p[target] / (1 - (1 - eps) * p[target])
        gradient = [s * ((j == target) - p_j) for j, p_j in enumerate(p)]
        return float(-mpmath.log(1 - (1 - eps) * p[target])), [float(g) for g in gradient]


class Recorded:
    """What ran in a block, seen by the profiler: names of operations, sizes of allocations."""

    def __enter__(self):
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception):
        self._profiler.__exit__(*exception)
        events = self._profiler.profiler.kineto_results.events()
        self.largest_bytes = max(e.nbytes() for e in events if e.name() == "[memory]")
        self.gemms = [e.name() for e in events].count("aten::mm")
