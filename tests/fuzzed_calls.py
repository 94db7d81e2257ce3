"""Calls of the public functions with arguments of every kind, from a seed, and a table of them.

`python tests/fuzzed_calls.py [SEED] [--calls N]` prints for each kind how many were tried, how many
were refused, and what was wrong: a crash, memory changed by a refused call, an error without a
sentence, a result that the float64 reference does not give, a state that never recovers. Every
batch of calls runs in a child, so that a crash is one fault and not the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mollm_ops
from mollm.optim.optimizer import MOLLMOptimizer
from mollm_ops import reference
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.dual_space import solve

BATCH = 500
REFUSED = (
    ValueError, TypeError, RuntimeError, KeyError, OverflowError, AssertionError, IndexError,
)  # fmt: skip
NAN, INF = float("nan"), float("inf")
WIDE = 1e15
"""Beyond it the float32 sums of small tests may overflow or lose all digits."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 2e-2}
NUMBERS = (NAN, INF, -INF, -1.0, 0.0, 1.0, 2.0, 1e-40, 1e30, 1e308, -0.0, 1e-3)


class Wrong(Exception):
    """What a call should not have done."""


def attempt(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the call was refused, in a sentence, and what it gave."""
    try:
        return False, call()
    except REFUSED as error:
        if not str(error).strip():
            raise Wrong(f"an error without a sentence: {error!r}") from error
        return True, None


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(t)


def spread(t: Tensor) -> Tensor:
    """The same numbers, with room between them in memory."""
    wider = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wider[..., 0] = t
    return wider[..., 0]


def like_of(t: Tensor, rng: random.Random) -> Any:
    """Something else in the place of a tensor."""
    ways: tuple[Callable[[], Any], ...] = (
        lambda: t.long(), lambda: t.bool(), lambda: t.to(torch.complex64), lambda: t.to("meta"),
        lambda: fake(t), lambda: t.tolist(), lambda: None, lambda: torch.zeros(0), lambda: t[:0],
        lambda: t.unsqueeze(0), lambda: t.flatten(), lambda: torch.cat([t, t]), lambda: t.double(),
        lambda: t.half(), lambda: t.bfloat16(), lambda: spread(t), lambda: t.to_sparse(),
        lambda: t.reshape(-1)[:1].reshape(()), lambda: torch.full_like(t, NAN), lambda: t * 1e30,
        lambda: t.flip(0), lambda: t.transpose(0, -1), lambda: t.float() * INF,
        lambda: t.expand(2, *t.shape), lambda: "text", lambda: 3, lambda: np.ones(3),
    )  # fmt: skip
    try:
        return rng.choice(ways)()
    except (RuntimeError, IndexError, TypeError):
        return None


def finite(values: Any) -> bool:
    return bool(torch.as_tensor(values).double().isfinite().all())


def largest(*values: Any) -> float:
    sizes = [float(v.double().abs().max()) for v in values if isinstance(v, Tensor) and v.numel()]
    return max((size for size in sizes), default=0.0)


def compare(
    name: str, got: Tensor, exact: Tensor, tolerance: float, wide: bool, slack: float = 1e-6
) -> None:
    """Refuses a result that is finite and not right, or finite where the exact one is NaN.

    What the exact result cancels to, rounding leaves something of: `slack` is no error.
    """
    if got.shape != exact.shape:
        raise Wrong(f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    most = torch.finfo(got.dtype).max
    got, exact = got.detach().double(), exact.detach().double()
    if got.numel() == 0 or wide:  # beyond float32 anything but a finite lie; see below
        if wide and exact.isnan().any() and got.isfinite().all():
            raise Wrong(f"{name}: finite, where the reference is NaN")
        return
    if bool((exact.isnan() & got.isfinite()).any()):
        raise Wrong(f"{name}: finite, where the reference is NaN")
    both = exact.abs() <= most  # beyond that, its dtype has but infinity
    if bool((both & ~got.isfinite()).any()):
        raise Wrong(f"{name}: not finite, where the reference is {exact[both][:3].tolist()}")
    scale = max(float(exact[both].abs().max()) if bool(both.any()) else 0.0, 1e-30)
    off = float(torch.where(both, got - exact, torch.zeros_like(exact)).abs().max())
    if off > tolerance * scale + slack:
        raise Wrong(f"{name}: off by {off:.3g} of {scale:.3g}, of dtype tolerance {tolerance}")


# ---- what tests/ops/test_invalid_calls.py spoils


def _invalid_calls() -> Any:
    path = Path(__file__).parent / "ops" / "test_invalid_calls.py"
    spec = importlib.util.spec_from_file_location("invalid_calls", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["invalid_calls"] = module
    spec.loader.exec_module(module)
    return module


INVALID = _invalid_calls()


def invalid_extension_calls(rng: random.Random) -> bool:
    name, argument, spoil = rng.choice(INVALID.EXTENSION_CASES)
    spoils = {argument: spoil}
    for _ in range(rng.randrange(3)):
        other = rng.choice([c for c in INVALID.EXTENSION_CASES if c[0] == name])
        spoils.setdefault(other[1], other[2])
    INVALID.call_extension(name, list(spoils.items()))
    return True


def invalid_op_calls(rng: random.Random) -> bool:
    INVALID.call_public(*rng.choice(INVALID.PUBLIC_CASES))
    return True


# ---- losses


def _loss_call(rng: random.Random) -> tuple[str, list[Tensor], dict[str, Any]]:
    """A loss, the tensors that get gradients, and all arguments by name."""
    name = rng.choice(
        ["uce_loss", "linear_uce_loss", "linear_cross_entropy", "linear_kl_div", "linear_ce_kl"]
    )
    rows, width, vocab = rng.choice([0, 1, 2, 5, 17]), rng.choice([1, 3, 8]), rng.choice([1, 2, 33])
    dtype, size = rng.choice(DTYPES), rng.choice([1e-3, 1.0, 30.0])
    shape = (rows,) if rng.random() < 0.8 else (2, rows)
    hidden = (torch.randn(*shape, width) * size).to(dtype)
    weight = torch.randn(vocab, width).to(dtype)
    target = torch.randint(0, vocab, shape)
    target[torch.rand(shape) < 0.3] = -100
    if rng.random() < 0.3:
        hidden = spread(hidden)
    if rng.random() < 0.2:
        weight = weight.T.contiguous().T
    given: dict[str, Any] = {"reduction": rng.choice(["mean", "sum", "none"])}
    if rng.random() < 0.3:
        given["softcap"] = rng.choice([0.5, 5.0, 50.0])
    if rng.random() < 0.3:
        given["logit_scale"] = rng.choice([0.1, 2.0])
    if name == "uce_loss":
        logits = (torch.randn(*shape, vocab) * size).to(dtype)
        given |= {"logits": logits, "target": target, "eps": rng.choice([1e-3, 0.5, 1e-8])}
        return name, [logits], given
    given |= {"hidden": hidden, "weight": weight}
    if rng.random() < 0.3:
        given["bias"] = torch.randn(vocab).to(dtype)
    if rng.random() < 0.3:
        given["chunk_rows"] = rng.choice([1, 2, 1000])
    if rng.random() < 0.3 and given["reduction"] == "mean":
        given["normalizer"] = rng.choice([3.0, torch.tensor(7.0)])
    if name == "linear_uce_loss":
        given["eps"] = rng.choice([1e-3, 0.5, 1e-8])
    if name != "linear_kl_div":
        given["target"] = target
    if "kl" in name:
        given["ref_hidden"] = (torch.randn(*shape, width) * size).to(dtype)
        if rng.random() < 0.5:
            given["ref_weight"] = torch.randn(vocab, width).to(dtype)
        if name == "linear_kl_div" and rng.random() < 0.5:
            given["mask"] = torch.rand(shape) < 0.6
    return name, [hidden, weight], given


_REPLACED: dict[str, tuple[Any, ...]] = {
    "reduction": ("x", "", None, 3, "Mean"),
    "eps": (*NUMBERS, "x", None, torch.tensor(0.1)),
    "softcap": (*NUMBERS, "x", True),
    "logit_scale": (*NUMBERS, "x", None),
    "normalizer": (*NUMBERS, "x", torch.tensor(0.0), torch.ones(2), torch.tensor(NAN)),
    "chunk_rows": (0, -1, 1.5, 10**18, "x", True),
    "ignore_index": (-1, 0, 10**30, "x", None, 1.5),
}


def _spoilt_loss(given: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(sorted(given))
    if name in _REPLACED:
        given[name] = rng.choice(_REPLACED[name])
    elif name == "target":
        t = given[name].clone()
        if t.numel() and rng.random() < 0.6:
            place = tuple(rng.randrange(n) for n in t.shape)
            t[place] = rng.choice([-1, -101, 33, 10**9, 2**62, -(2**63), 1, 2])
            given[name] = t
        else:
            given[name] = like_of(t, rng)
    elif isinstance(given[name], Tensor) and given[name].numel() and rng.random() < 0.4:
        t = given[name].clone()
        if t.is_floating_point():
            place = tuple(rng.randrange(n) for n in t.shape)
            t[place] = rng.choice([NAN, INF, -INF, 1e30, 60000.0])
        given[name] = t
    else:
        given[name] = like_of(given[name], rng)
    return name


def losses(rng: random.Random, spoil: bool = False) -> bool:
    name, wanted, given = _loss_call(rng)
    spoilt = _spoilt_loss(given, rng) if spoil else ""
    names = [n for n, v in given.items() if any(v is t for t in wanted)]
    if name == "linear_kl_div" and rng.random() < 0.1:
        given["ignore_index"] = -100  # no argument of it
    leaves = {n: given[n].detach().clone().requires_grad_() for n in names}
    before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor) and not _is_odd(v)}
    called = {**given, **leaves}
    refused, got = attempt(lambda: getattr(mollm_ops, name)(**called))
    for n, old in before.items():
        if not torch.equal(given[n].nan_to_num(), old.nan_to_num()):
            raise Wrong(f"{name} changed its argument {n}")
    if refused:
        if not spoil and "ignore_index" not in given:
            raise Wrong(f"{name} refused valid arguments")
        return True
    tensors = [v for v in called.values() if isinstance(v, Tensor)]
    if any(_is_odd(t) for t in tensors):
        return False
    wide = {n: _doubled(v) for n, v in called.items() if n != "chunk_rows"}
    wide_leaves = {n: called[n].detach().double().requires_grad_() for n in names}
    infinite = any(bool(t.isinf().any()) for t in tensors if t.is_floating_point())
    if infinite or float(given.get("normalizer", 1.0)) == 0:
        return False  # 0 log 0 and 0 / 0 are 0 here, and NaN in the reference
    function = getattr(reference, f"{name}_reference")
    missing, exact = attempt(lambda: function(**{**wide, **wide_leaves}))
    if missing:
        raise Wrong(
            f"{name} took {spoilt} = {given.get(spoilt)!r:.80}, which its reference does not"
        )
    dtype = next(iter(leaves.values())).dtype if leaves else torch.float32
    tolerance = TOLERANCES.get(dtype, 1e-3)
    beyond = largest(*(t for t in tensors if t.is_floating_point())) > 1e4
    beyond |= given.get("logit_scale", 1.0) > 1e10
    sizes = largest(*(t for t in tensors if t.is_floating_point() and t.ndim))
    divisor = float(given.get("normalizer", 1.0))
    slack = tolerance * 1e-2 * (1 + sizes) ** 2 * max(1.0, 1 / divisor if divisor else INF)
    outs = got if isinstance(got, tuple) else (got,)
    exacts = exact if isinstance(exact, tuple) else (exact,)
    for out, true in zip(outs, exacts, strict=True):
        compare(f"{name} of {spoilt or 'valid arguments'}", out, true, tolerance, beyond, slack)
    if all(out.requires_grad for out in outs) and leaves and not beyond:
        up = sum(out.double().sum() for out in outs)
        true_up = sum(out.double().sum() for out in exacts)
        mine = torch.autograd.grad(up, list(leaves.values()))
        true_grads = torch.autograd.grad(true_up, list(wide_leaves.values()))
        for n, a, b in zip(leaves, mine, true_grads, strict=True):
            if finite(b):
                compare(f"{name}'s gradient of {n}", a, b, 4 * tolerance, beyond, slack)
    return False


def _is_odd(t: Tensor) -> bool:
    return t.device.type != "cpu" or hasattr(t, "fake_mode") or t.layout != torch.strided


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def spoilt_losses(rng: random.Random) -> bool:
    return losses(rng, spoil=True)


# ---- Gram matrix, weighted sum, products


_SIZES = (1.0, 1.0, 1.0, 1e-3, 1e4, 1e-25, 1e20, 1e-12)


def _lists(rng: random.Random, odd: bool = True) -> list[list[Tensor | None]]:
    K, N = rng.randrange(1, 10), rng.randrange(1, 5)
    shapes = [rng.choice([(), (1,), (0,), (5,), (3, 4), (2, 1, 3), (70,)]) for _ in range(N)]
    if all(0 in s for s in shapes):
        shapes[0] = (5,)
    dtype = rng.choice(DTYPES)
    size = rng.choice(_SIZES) if dtype in (torch.float32, torch.float64) else 1.0
    rows: list[list[Tensor | None]] = []
    for _ in range(K):
        row: list[Tensor | None] = []
        for s in shapes:
            t = (torch.randn(s, dtype=torch.float64) * size).to(dtype)
            if odd and t.ndim and rng.random() < 0.1:
                t = spread(t)
            if odd and t.numel() and rng.random() < 0.02:
                t = t.clone()
                t.view(-1)[0] = rng.choice([NAN, INF])
            row.append(t)
        rows.append(row)
    if odd and K > 1 and rng.random() < 0.2:
        rows[rng.randrange(K)][rng.randrange(N)] = None
    return rows


def _all(rows: list[list[Tensor | None]]) -> list[Tensor]:
    return [t for row in rows for t in row if t is not None]


def gram_calls(rng: random.Random) -> bool:
    rows = _lists(rng)
    dtype = _all(rows)[0].dtype
    size = largest(*_all(rows))
    valid = all(any(row[n] is not None for row in rows) for n in range(len(rows[0])))
    which = rng.randrange(4)
    w = torch.randn(len(rows), dtype=torch.float64)
    if which == 0:
        refused, got = attempt(lambda: mollm_ops.gram(rows))
        exact = reference.gram_reference(rows) if not refused else None
    elif which == 1:
        out = [torch.zeros_like(next(r[n] for r in rows if r[n] is not None)) if valid else None
               for n in range(len(rows[0]))]  # fmt: skip
        refused, got = attempt(lambda: mollm_ops.combine(rows, w, out=out))
        exact = reference.combine_reference(rows, w) if not refused else None
        if not refused:
            for a, b in zip(out, exact, strict=True):
                if a is not None and b is not None:
                    if finite(b):
                        compare("combine", a, b, TOLERANCES[dtype], size * 30 > _most(dtype))
                    elif finite(a) and b.isnan().any():
                        raise Wrong("combine is finite, where the reference is NaN")
            return False
    elif which == 2:
        x = [None if not valid else torch.randn_like(next(r[n] for r in rows if r[n] is not None))
             for n in range(len(rows[0]))]  # fmt: skip
        refused, got = attempt(lambda: mollm_ops.dots(rows, x))
        if refused:
            return True
        exact = torch.stack([
            sum(((t.double() * y.double()).sum() for t, y in zip(row, x, strict=True)
                 if t is not None), torch.zeros((), dtype=torch.float64))
            for row in rows
        ])  # fmt: skip
        scale = size * len(_all(rows)) * 70
        if finite(exact):
            if not finite(got) and size < WIDE:
                raise Wrong("dots is not finite")
            if finite(got) and float((got - exact).abs().max()) > 1e-6 * scale + 1e-30:
                raise Wrong(f"dots is off: {got.tolist()} for {exact.tolist()}")
        elif finite(got):
            raise Wrong("dots is finite, where the reference is not")
        return False
    else:
        v = [None if rng.random() < 0.5 or not valid
             else torch.rand_like(next(r[n] for r in rows if r[n] is not None))
             for n in range(len(rows[0]))]  # fmt: skip
        steps = [torch.tensor(float(rng.randrange(3))) for _ in rows[0]]
        metric = AdamMetric(v, steps, torch.rand(len(rows), dtype=torch.float64))
        refused, got = attempt(lambda: mollm_ops.gram_moved(rows, metric=metric))
        if refused:
            return True
        exact = reference.gram_reference(reference.scaled_by_metric_reference(rows, metric))
        if dtype == torch.float16 or size > WIDE or 0 < size < 1e-10:
            exact = exact if not finite(exact) else got  # the metric itself may not be written
    if refused:
        if valid and which == 0:
            raise Wrong("gram refused valid arguments")
        return True
    norms = exact.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    if not finite(exact):
        if finite(got) and not (exact.double().abs() > 1e300).any():
            raise Wrong("a Gram matrix is finite, where the reference is not")
        return False
    if not finite(got):
        raise Wrong(f"a Gram matrix is not finite, of gradients up to {size:.3g}")
    off = ((got - exact).abs() - (4e-3 if which == 3 else 2e-6) * scale).max()
    if float(off) > 0:
        raise Wrong(f"a Gram matrix is off by {float(off):.3g} of {float(scale.max()):.3g}")
    return False


def _most(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


# ---- the step


def update_calls(rng: random.Random) -> bool:
    rows = _lists(rng, odd=rng.random() < 0.3)
    if any(t is None for row in rows for t in row):
        rows = [list(row) for row in rows if None not in row]
        if not rows:
            return True
    K, like = len(rows), rows[0]
    params = [torch.randn_like(t).contiguous() for t in like]
    adamw = rng.random() < 0.6
    kept = rng.choice([t for t in DTYPES if t != torch.float16]) if rng.random() < 0.3 else None
    state = [torch.rand_like(t).contiguous().to(kept or t.dtype) for t in like]
    first = [t.clone() for t in state] if rng.random() < 0.5 or not adamw else None
    targets = Targets(params, first, state if adamw else None, [torch.ones(()) for _ in like])
    w = torch.rand(K, dtype=torch.float64) * (torch.rand(K) < 0.8)
    lr = rng.choice([0.0, 1e-3, 0.1, torch.tensor(0.01)])
    decay = rng.choice([0.0, 0.01])
    method: Any = SgdStep(lr, momentum=rng.choice([0.0, 0.9]), weight_decay=decay)
    if adamw:
        weights = torch.rand(K, dtype=torch.float64) if rng.random() < 0.5 else None
        method = AdamWStep(lr, weight_decay=decay, second_weights=weights)
    means = [[torch.zeros_like(t).contiguous() for t in row] for row in rows]
    moving = RunningMeans(means, 0.9) if rng.random() < 0.3 else None
    copies = [[t.clone() for t in ts] for ts in (params, first or [], state)]
    twin = Targets(copies[0], copies[1] if first else None, copies[2] if adamw else None,
                   targets.steps)  # fmt: skip
    twin_moving = RunningMeans([[t.clone() for t in r] for r in means], 0.9) if moving else None
    proceed = torch.tensor(rng.random() < 0.8) if rng.random() < 0.4 else None
    refused, _ = attempt(
        lambda: mollm_ops.update_(
            rows, w, targets, method, moving=moving, proceed=proceed, track=True
        )
    )
    if refused:
        return True
    if proceed is not None and not proceed:
        for a, b in zip([*params, *state], [*copies[0], *copies[2]], strict=True):
            if not torch.equal(a, b):
                raise Wrong("update_ wrote, though it was not to proceed")
        return False
    reference.update_reference(rows, w, twin, method, moving=twin_moving)
    if largest(*_all(rows)) > WIDE or not all(finite(t) for t in _all(rows)):
        return False  # what the optimizer never lets through
    for what, mine, true in (("params", params, copies[0]), ("state", state, copies[2]),
                             ("first", first or [], copies[1])):  # fmt: skip
        for a, b in zip(mine, true, strict=True):
            if finite(b):
                tolerance = max(TOLERANCES[a.dtype], TOLERANCES[like[0].dtype])
                compare(f"update_'s {what}", a, b, tolerance, False)
    return False


# ---- the solver


def _gram_matrix(rng: random.Random) -> Tensor:
    K = rng.randrange(1, 9)
    rank = rng.randrange(1, K + 2)
    V = torch.randn(K, rank, dtype=torch.float64)
    way = rng.randrange(8)
    if way == 0 and K > 1:
        V[1] = -V[0]
    elif way == 1:
        V[rng.randrange(K)] = 0
    elif way == 2:
        V *= 10.0 ** torch.randint(-12, 12, (K, 1)).double()
    elif way == 3 and K > 1:
        V[1] = V[0] * (1 + 1e-9)
    G = V @ V.T * 10.0 ** rng.choice([0, 0, 0, -200, -30, 30, 200])
    if way == 4:
        G[rng.randrange(K), rng.randrange(K)] = rng.choice([NAN, INF, -INF])
    return G


def solver_calls(rng: random.Random) -> bool:
    G = _gram_matrix(rng)
    K = len(G)
    name = rng.choice(["dual", "mgda", "project", "upgrad"])
    call = {
        "dual": mollm_ops.dual_space_weights, "mgda": mollm_ops.min_norm_weights,
        "project": mollm_ops.project_weights, "upgrad": mollm_ops.upgrad_weights,
    }[name]  # fmt: skip
    length, normalize = rng.choice(["mean", "min-norm", "first"]), rng.random() < 0.5
    given: dict[str, Any] = {"gram": G, "length": length}
    preferences = None
    if name != "dual":
        given["normalize"] = normalize
    if name in ("project", "upgrad") and rng.random() < 0.5:
        preferences = [rng.choice([0.0, 1.0, 0.3, 7.0]) for _ in range(K)]
        given["preferences"] = preferences
    spoilt = rng.random() < 0.25
    if spoilt:
        key = rng.choice(sorted(given))
        if key == "gram":
            given[key] = like_of(G, rng)
        elif key == "length":
            given[key] = rng.choice(["x", "", None, 3])
        elif key == "preferences":
            given[key] = rng.choice([[1.0] * (K + 1), [], [-1.0] * K, [NAN] * K, [INF] * K, "x", 3])
        else:
            given[key] = rng.choice([True, False])
    refused, found = attempt(lambda: call(**given))
    if refused:
        if not spoilt:
            raise Wrong(f"{name} refused a valid Gram matrix")
        return True
    weights = found.weights
    if not isinstance(given["gram"], Tensor) or _is_odd(given["gram"]) or weights.is_meta:
        return False
    if not finite(weights):
        raise Wrong(f"{name}'s weights are not finite")
    if spoilt:
        return False
    wanted = solve(
        G.numpy(), name, None if preferences is None else np.array(preferences),
        normalize=normalize, length=length,
    )  # fmt: skip
    mine = int(found.status)
    y = weights * G.diagonal().abs().sqrt()
    true = torch.from_numpy(np.asarray(wanted.weights)) * G.diagonal().abs().sqrt()
    near = finite(true) and float((y - true).abs().max()) <= 1e-5 * max(float(true.abs().max()), 0)
    if mine == wanted.status and (near or not finite(G)):
        return False
    # Where a matrix is nearly singular two solvers may part, but none may call a step a descent.
    if float(y.abs().max()) > 0:
        norms = G.diagonal().clamp(min=0).sqrt()
        slope = (G / norms.clamp(min=1e-300)[:, None] @ weights)[norms > 0]
        size = float((weights @ G @ weights).clamp(min=0).sqrt())
        if float(slope.min()) < -1e-6 * size and name != "mgda":
            raise Wrong(f"{name} climbs: status {mine}, reference {wanted.status}")
    return False


# ---- the optimizer


_CONSTRUCTED: dict[str, tuple[Any, ...]] = {
    "lr": (*NUMBERS, "x", None, torch.ones(2), torch.tensor(NAN), [1.0], True),
    "objectives": ((), "abc", ("a", "a"), (1, 2), None, ("",), [["a"]], ("a",) * 20),
    "base": ("x", None, 3, dict, lambda params, lr: None, torch.optim.LBFGS, torch.optim.SparseAdam,
             torch.optim.Adam, torch.nn.Linear),
    "direction": ("x", None, 3, lambda G: None, lambda G: G, lambda G: G[0] * NAN, lambda G: "x",
                  lambda G: torch.ones(7), lambda G: 1 / 0),
    "preferences": ([], [1.0], [-1.0] * 3, [NAN] * 3, "abc", 3, [0.0] * 3, [INF, 1, 1]),
    "length": ("x", None, 3, ""),
    "momentum": (*NUMBERS, "x", "per-objective", [1]),
    "mean_beta": (*NUMBERS, "x", None),
    "metric": ("x", None, 3),
    "gradient_memory": ("x", None, 3),
    "on_nonfinite": ("x", None, True),
    "weight_decay": (*NUMBERS, "x", None, torch.ones(2)),
    "betas": ((), (0.9,), (1.0, 0.9), (-1, 0.9), (0.9, NAN), "ab", None, (0.9, 0.99, 0.999),
              ("a", 1)),
    "eps": (*NUMBERS, "x", None),
    "state_dtype": ("x", torch.int8, torch.float16, torch.complex64, None, 3),
    "nesterov": (True, "x"), "dampening": (0.5,), "nosuch": (1,), "foreach": (True,),
    "stochastic_rounding": (True, "x"), "maximize": (True,), "amsgrad": (True,),
    "params": ([], None, "x", [3], [torch.ones(2)], [{}], [{"params": 3}], torch.ones(3),
               [{"params": [], "lr": "x"}], [torch.nn.Parameter(torch.ones(2).to("meta"))],
               [torch.nn.Parameter(torch.zeros(0))], [torch.nn.Parameter(torch.ones(()))],
               [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
}  # fmt: skip


def _parameters(rng: random.Random, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    shapes = [(3,), (2, 3), ()][: rng.randrange(1, 4)]
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]


def _options(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"lr": rng.choice([1e-3, 0.1])}
    given["base"] = rng.choice(["adamw", "adamw", "sgd", torch.optim.AdamW, torch.optim.SGD])
    given["direction"] = rng.choice(["upgrad", "project", "dual", "mgda", "pcgrad", "sum"])
    given["metric"] = rng.choice(["base", "euclidean"])
    if rng.random() < 0.3:
        given["momentum"] = "per-objective"
    if rng.random() < 0.2:
        given["gradient_memory"] = "bfloat16"
    if rng.random() < 0.3:
        given["track_conflicts"] = False
    return given


def _lend(optimizer: MOLLMOptimizer, params: list[Tensor], sizes: list[float]) -> None:
    for name, size in zip(optimizer.objectives, sizes, strict=True):
        with optimizer.objective(name):
            for p in params:
                g = torch.randn(p.shape, dtype=torch.float64)
                g = torch.where(g.abs() < 0.1, 0.1, g) * size
                p.grad = g.to(p.dtype)


def _steps_on(optimizer: MOLLMOptimizer, params: list[Tensor], what: str) -> None:
    """Every weight must move again within a few steps along ordinary gradients."""
    before = [p.detach().double() for p in params]
    for _ in range(8):
        optimizer.zero_grad()
        _lend(optimizer, params, [1.0] * len(optimizer.objectives))
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        if not finite(p.detach()):
            raise Wrong(f"{what}: a weight is not finite")
        if optimizer.skipped_steps == 0 and p.numel() and optimizer.param_groups[0]["lr"] > 1e-4:
            still = p.detach().double() == old
            if bool(still.any()) and p.dtype not in (torch.bfloat16, torch.float16):
                raise Wrong(f"{what}: a weight does not move")


def made_optimizers(rng: random.Random) -> bool:
    params: Any = _parameters(rng, torch.float32)
    given = {**_options(rng)}
    name = rng.choice(sorted(_CONSTRUCTED))
    value = rng.choice(_CONSTRUCTED[name])
    if name == "params":
        params = value
    else:
        given[name] = value
    refused, optimizer = attempt(lambda: MOLLMOptimizer(params, **given))
    if refused:
        return True
    if name in ("params", "base"):
        return False

    def go() -> None:
        _lend(optimizer, params, [1.0] * len(optimizer.objectives))
        optimizer.step()

    refused, _ = attempt(go)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if not all(finite(t.detach()) for t in [*params, *state]):
        raise Wrong(f"an optimizer with {name} = {value!r:.60} writes what is not finite")
    return refused


def stepped_optimizers(rng: random.Random) -> bool:
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    params, given = _parameters(rng, dtype), _options(rng)
    if dtype == torch.float16 and not isinstance(given["base"], str):
        given["base"] = "adamw"  # to Torch's own an ε of 1e-8 is 0 there, and its state 0 / 0
    optimizer = MOLLMOptimizer(params, **given)
    for _ in range(rng.randrange(3)):
        _lend(optimizer, params, [1.0] * 3)
        optimizer.step()
    odd = [
        rng.choice([1.0, 0.0, 1e-30, 1e4, 1e18, 1e19, 1e20, 1e30, 3e38, INF, NAN]) for _ in "abc"
    ]
    before = [p.detach().clone() for p in params]
    kept = [
        t.clone() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
    ]
    skipped = optimizer.skipped_steps
    refused, _ = attempt(lambda: (_lend(optimizer, params, odd), optimizer.step()))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    what = f"{given}, {dtype}, gradients of sizes {odd}"
    if optimizer.skipped_steps > skipped:
        same = all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        if kept:
            same = same and all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
        if not same:
            raise Wrong(f"a skipped step wrote: {what}")
    if not all(finite(t.detach()) for t in [*params, *state]):
        raise Wrong(f"poisoned: {what}")
    if refused:
        raise Wrong(f"a step raised: {what}")
    big = any(1 < size < INF for size in odd)
    if not big and dtype == torch.float32 and optimizer.skipped_steps == 0:
        _steps_on(optimizer, params, what)
    return optimizer.skipped_steps > skipped


def misused_optimizers(rng: random.Random) -> bool:
    params, given = _parameters(rng, torch.float32), _options(rng)
    optimizer = MOLLMOptimizer(params, **given)
    saved = optimizer.state_dict()

    def backward() -> None:
        optimizer.backward({n: sum(p.square().sum() for p in params) for n in optimizer.objectives})

    def nested() -> None:
        with optimizer.objective("forget"), optimizer.objective("kl"):
            pass

    def raising() -> None:
        with optimizer.objective("kl"):
            params[0].grad = torch.ones_like(params[0])
            raise RuntimeError("in the middle")

    def stray() -> None:
        params[0].grad = torch.ones_like(params[0])

    def gone() -> None:
        params[0].grad = None

    def add() -> None:
        p = torch.nn.Parameter(torch.randn(2))
        optimizer.add_param_group({"params": [p]})
        params.append(p)

    ways: list[Callable[[], Any]] = [
        backward, backward, optimizer.aggregate, optimizer.step, optimizer.step,
        optimizer.zero_grad, lambda: optimizer.zero_grad(set_to_none=False), nested, raising, stray,
        gone, add, lambda: optimizer.load_state_dict(saved), optimizer.state_dict,
        lambda: optimizer.objective("x").__enter__(),
        lambda: optimizer.backward({"x": params[0].sum()}), lambda: optimizer.backward({}),
        lambda: _lend(optimizer, params, [1.0] * 3), lambda: optimizer.step(lambda: 1 / 0),
        lambda: torch.nn.utils.clip_grad_norm_(params, 0.1), lambda: optimizer.last_step.conflicts,
    ]  # fmt: skip
    any_refused = False
    for _ in range(8):
        try:
            refused, _ = attempt(rng.choice(ways))
            any_refused |= refused
        except (ZeroDivisionError, AttributeError):
            any_refused = True
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if not all(finite(t.detach()) for t in [*params, *state]):
        raise Wrong(f"misuse of {given} wrote what is not finite")
    for p in params:
        p.grad = None
    refused, _ = attempt(lambda: (optimizer.zero_grad(), _steps_on(optimizer, params, "misused")))
    if refused:
        raise Wrong(f"{given} does not recover from misuse after zero_grad()")
    return any_refused


def saved_states(rng: random.Random) -> bool:
    params, given = _parameters(rng, torch.float32), _options(rng)
    optimizer = MOLLMOptimizer(params, **given)
    for _ in range(2):
        _lend(optimizer, params, [1.0] * 3)
        optimizer.step()
    saved = optimizer.state_dict()
    saved = {**saved, "state": {k: dict(v) for k, v in saved["state"].items()},
             "param_groups": [dict(g) for g in saved["param_groups"]]}  # fmt: skip
    where: Any = rng.choice([saved, *saved["state"].values(), *saved["param_groups"]])
    if not where:
        return False
    key = rng.choice(list(where))
    way = rng.randrange(3)
    if way == 0:
        del where[key]
    elif isinstance(where[key], Tensor):
        where[key] = like_of(where[key], rng)
    else:
        where[key] = rng.choice(
            [None, "x", -1, NAN, INF, [], {}, 10**30, torch.ones(3), True, (1, 2)]
        )
    before = [p.detach().clone() for p in params]
    kept = [
        t.clone() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
    ]
    refused, _ = attempt(lambda: optimizer.load_state_dict(saved))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if refused:
        both = zip([*params, *state], [*before, *kept], strict=True)
        if not all(torch.equal(a, b) for a, b in both):
            raise Wrong(f"a refused state changed {key}")
        if any(isinstance(g, dict) is False for g in optimizer.param_groups):
            raise Wrong("a refused state left its groups")
    stopped, _ = attempt(lambda: (_lend(optimizer, params, [1.0] * 3), optimizer.step()))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if not all(finite(t.detach()) for t in [*params, *state]):
        raise Wrong(f"a state with {key} = {where.get(key)!r:.60} poisons the step")
    if not isinstance(given["base"], str):
        return refused  # the state of another optimizer is its own affair
    if stopped and refused:
        raise Wrong(f"after a refused state ({key}) no step can be made")
    if stopped:
        raise Wrong(f"a state with {key} = {where.get(key, 'nothing')!r:.60} is taken, then fails")
    return refused


KINDS: dict[str, tuple[Callable[[random.Random], bool], int]] = {
    # kind: the call, and its share of all
    "extension, invalid": (invalid_extension_calls, 20),
    "ops, invalid": (invalid_op_calls, 20),
    "losses, valid": (losses, 8),
    "losses, spoilt": (spoilt_losses, 20),
    "Gram matrices, sums, products": (gram_calls, 10),
    "update_": (update_calls, 5),
    "solver": (solver_calls, 10),
    "optimizer, made": (made_optimizers, 3),
    "optimizer, odd gradients": (stepped_optimizers, 2),
    "optimizer, misused": (misused_optimizers, 1),
    "optimizer, saved states": (saved_states, 1),
}  # fmt: skip


def one(kind: str, seed: int, number: int) -> tuple[bool, str | None]:
    """Makes one call: whether it was refused, and what was wrong."""
    rng = random.Random(f"{kind} {seed} {number}")
    torch.manual_seed(rng.randrange(2**31))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return KINDS[kind][0](rng), None
    except ZeroDivisionError:
        return True, None  # of a rule that the caller wrote
    except (Wrong, AssertionError) as fault:
        return False, str(fault)[:400]
    except BaseException as fault:  # of a call that should have refused, or of this file
        place = traceback.extract_tb(fault.__traceback__)[-1]
        if "DID NOT RAISE" in str(fault):
            return False, "an invalid call was not refused"
        return False, f"{type(fault).__name__}: {fault!s:.300} at {place.filename}:{place.lineno}"


def batch(kind: str, seed: int, numbers: range, out: int) -> None:
    """In a child: prints the number of each call before it is made, then what came of it."""
    with os.fdopen(out, "w") as file:
        for number in numbers:
            file.write(f"{number}\n")
            file.flush()
            refused, wrong = one(kind, seed, number)
            file.write(f"={int(refused)}{wrong or ''}\n".replace("\n", " ").rstrip() + "\n")


def run_batch(kind: str, seed: int, numbers: range) -> tuple[int, int, list[str]]:
    """Calls made and refused, and faults."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        signal.alarm(300)
        try:
            batch(kind, seed, numbers, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        lines = file.read().splitlines()
    _, wait = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(wait)
    results = [line for line in lines if line.startswith("=")]
    started = [line for line in lines if not line.startswith("=")]
    faults = [
        f"{kind} {seed} {number}: {line[2:]}"
        for number, line in zip(started, results, strict=False)
        if line[2:]
    ]
    if status != 0 or len(results) < len(started):
        faults.append(f"{kind} {seed} {started[-1]}: crash, status {status}")
        done, refused, more = run_batch(kind, seed, range(int(started[-1]) + 1, numbers.stop))
        return (
            len(started) + done,
            sum(line[1] == "1" for line in results) + refused,
            faults + more,
        )
    return len(results), sum(line[1] == "1" for line in results), faults


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--kind", default="", help="the beginning of the kinds to try")
    parser.add_argument("--one", type=int, help="a single call, with its traceback")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {kind: share for kind, (_, share) in KINDS.items() if kind.startswith(asked.kind)}
    if asked.one is not None:
        rng = random.Random(f"{asked.kind} {asked.seed} {asked.one}")
        torch.manual_seed(rng.randrange(2**31))
        print("refused" if KINDS[asked.kind][0](rng) else "right")
        return 0
    begun, total, wrong = time.monotonic(), sum(chosen.values()), 0
    print(f"{'kind':32} {'tried':>8} {'refused':>8} {'wrong':>6}")
    sums = [0, 0]
    for kind, share in chosen.items():
        count, tried, refused, faults = math.ceil(asked.calls * share / total), 0, 0, []
        for start in range(0, count, BATCH):
            made, no, found = run_batch(kind, asked.seed, range(start, min(start + BATCH, count)))
            tried, refused, faults = tried + made, refused + no, faults + found
        print(f"{kind:32} {tried:8} {refused:8} {len(faults):6}", flush=True)
        for fault in faults[:40]:
            print(f"    {fault}", flush=True)
        wrong += len(faults)
        sums = [sums[0] + tried, sums[1] + refused]
    print(f"{'all':32} {sums[0]:8} {sums[1]:8} {wrong:6}   {time.monotonic() - begun:.0f} s")
    print(f"{sums[0]} tried, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
