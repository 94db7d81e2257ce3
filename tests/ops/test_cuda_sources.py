"""The CUDA sources on a CPU: against float64, and the same bits in every order of their threads."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from emulated_cuda import ADDRESSES, ORDERS, ROOT, build, emulated, load, set_order

from mollm_ops import _cuda, combine, gram
from mollm_ops._extension import extension
from mollm_ops.dual_space import LENGTHS, RULES, dual_space_weights
from mollm_ops.gram import gram_moved
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.dual_space import solve as solve_reference
from mollm_ops.reference.gram import (
    combine_reference,
    gram_reference,
    moved_means_reference,
    scaled_by_metric_reference,
)
from mollm_ops.reference.update import update_reference
from mollm_ops.update import _options, update_

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ALL = [*FLOATS, torch.float64]
CHUNK = 1 << 15  # csrc/gram.h, kCudaChunk
SIZES = [0, 1, 7, 8, 9, 17, 2047, 2048, 2049, 4101]
LARGE = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 11]
SEEDS = range(int(os.environ.get("MOLLM_EMULATED_CASES", "1")))


@pytest.fixture(scope="module")
def library():
    flags = os.environ.get("MOLLM_EMULATED_FLAGS", "").split()
    return build(flags, FAULTS.get(os.environ.get("MOLLM_EMULATED_FAULT", "")))


@pytest.fixture
def kernels(library):
    with emulated(load(library)):
        yield library


class Case:
    """Random lists: ragged sizes, some empty, missing or on no boundary of sixteen bytes."""

    def __init__(self, K, seed, dtypes, large=True):
        self.random = random.Random(f"{K} {seed} {dtypes}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        self.dtypes, self.misaligned = dtypes, self.random.random() < 0.4
        self.sizes = self.random.choices(SIZES, k=self.random.randint(1, 5))
        self.sizes += [self.random.choice(LARGE)] if large and self.random.random() < 0.5 else [9]
        self.gradients = self.lists(K, 0.2)

    def tensor(self, size, positive=False):
        dtype = self.random.choice(self.dtypes)
        offset = self.misaligned and self.random.random() < 0.5
        x = torch.randn(size, generator=self.generator, dtype=torch.float64)
        x = x.abs() if positive else x
        return torch.empty(size + offset, dtype=dtype)[offset:].copy_(x)

    def row(self, positive=False):
        return [self.tensor(n, positive) for n in self.sizes]

    def lists(self, K, missing=0.0):
        rows = [self.row() for _ in range(K)]
        last = len(self.sizes) - 1  # is always there
        return [
            [t if n == last or self.random.random() >= missing else None for n, t in enumerate(row)]
            for row in rows
        ]

    def moving(self):
        return RunningMeans(self.lists(len(self.gradients)), 0.9)

    def metric(self):
        K, steps = len(self.gradients), [torch.tensor(float(n)) for n in range(len(self.sizes))]
        second = [t if self.random.random() < 0.8 else None for t in self.row(positive=True)]
        weights = torch.rand(K, generator=self.generator, dtype=torch.float64)
        return AdamMetric(second, steps, weights, beta2=0.95)


def in_every_order(library, compute):
    """What `compute` returns, with the same bits in every order."""
    results = []
    for number in range(len(ORDERS)):
        set_order(library, number, seed=number)
        results.append(compute())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return results[0]


def error(G, exact):
    norms = exact.diagonal().clamp_min(1e-300).sqrt()
    return float(((G - exact) / (norms[:, None] * norms)).abs().max())


MIXES = {"one dtype": None, "floats": FLOATS, "with float64": ALL}


def dtypes_of(mix, seed):
    return MIXES[mix] or [ALL[seed % len(ALL)]]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("seed", SEEDS)
def test_gram_and_combine(kernels, K, seed, mix):
    case = Case(K, seed + K, dtypes_of(mix, seed + K))
    (G,) = in_every_order(kernels, lambda: [gram(case.gradients)])
    assert error(G, gram_reference(case.gradients)) <= 2e-7
    weights = torch.randn(K, generator=case.generator, dtype=torch.float64)
    if K > 1:
        weights[0] = 0.0
        case.gradients[0][-1].fill_(torch.inf)  # of weight 0: inert
    exact = combine_reference([[None if t is None else t.double() for t in row] for row in
                               case.gradients], weights)  # fmt: skip
    out = in_every_order(
        kernels, lambda: [t for t in combine(case.gradients, weights) if t is not None]
    )
    for ours, true in zip(out, (t for t in exact if t is not None), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), true, rtol=eps, atol=4e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("seed", SEEDS)
def test_moved_and_metric_gram(kernels, K, seed, mix):
    case = Case(K, seed + K, dtypes_of(mix, seed + K))
    moving, metric = case.moving(), case.metric()
    held = [t.clone() for row in moving.means for t in row]
    for m, p in ((moving, None), (None, metric), (moving, metric)):
        (G,) = in_every_order(kernels, lambda m=m, p=p: [gram_moved(case.gradients, m, p)])
        rows = case.gradients if m is None else moved_means_reference(case.gradients, m)
        exact = gram_reference(rows if p is None else scaled_by_metric_reference(rows, p))
        # A mean that falls between two bfloat16 may be rounded to either.
        assert error(G, exact) <= (1e-6 if m is None else 3e-3)
    assert all(map(torch.equal, held, (t for row in moving.means for t in row)))


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("size", [1, 2050])
def test_a_gradient_that_is_not_finite(kernels, size, value):
    for K, dtype in ((1, torch.float32), (3, torch.bfloat16), (8, torch.float16)):
        for at in (0, size - 1):
            g = [[torch.randn(size).to(dtype)] for _ in range(K)]
            g[K // 2][0][at] = value
            metric = AdamMetric([torch.rand(size)], [torch.tensor(3.0)], torch.ones(K).double())
            exact = gram_reference(g)
            assert torch.equal(gram(g).isfinite(), exact.isfinite())
            assert not gram_moved(g, None, metric)[K // 2, K // 2].isfinite()


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e30])
def test_squares_beyond_a_floats_range(kernels, scale):
    g = [[scale * torch.randn(5000)] for _ in range(3)]
    assert error(gram(g), gram_reference(g)) <= 2e-7
    v = [torch.zeros(5000)]
    metric = AdamMetric(v, [torch.tensor(0.0)], torch.full((3,), 1 / 3).double(), eps=0.0)
    exact = gram_reference(scaled_by_metric_reference(g, metric))
    (G,) = in_every_order(kernels, lambda: [gram_moved(g, None, metric)])
    assert torch.equal(G.isfinite(), exact.isfinite())
    if exact.isfinite().all():
        assert error(G, exact) <= 1e-6


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("kind", ["random", "conflict", "dependent", "zero", "not finite"])
def test_the_solver_is_the_hosts(kernels, K, kind):
    generator = torch.Generator().manual_seed(K)
    g = torch.randn(K, K + 3, generator=generator, dtype=torch.float64)
    if kind == "conflict":
        g += 3 * (-1.0) ** torch.arange(K)[:, None]
    elif kind == "dependent":
        g[-1] = -g[:-1].sum(0)
    elif kind == "zero":
        g[K // 2] = 0
    G = g @ g.T
    if kind == "not finite":
        G[0, 0] = torch.nan
    preferences = torch.rand(K, generator=generator).tolist()
    for rule, length, normalize in zip(range(4), (0, 1, 2, 0), (0, 1, 1, 0), strict=True):
        (packed,) = in_every_order(
            kernels,
            lambda r=rule, a=length, n=normalize: [_cuda.solve(G, r, preferences, bool(n), a)],
        )
        expected = solve_reference(
            G.numpy(),
            RULES[rule],
            torch.tensor(preferences).double().numpy() if rule >= 2 else None,
            normalize=bool(normalize),
            length=LENGTHS[length],
        )
        assert int(packed[K]) == expected.status
        if kind != "not finite":
            ours, theirs = packed[:K] @ g, torch.from_numpy(expected.weights).double() @ g
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights, status, gap = extension.dual_space_solution(G.numpy(), 0)
    ours = dual_space_weights(G)
    host = torch.tensor([*weights, status, gap], dtype=torch.float64)
    packed = torch.tensor([*ours.weights, ours.status, ours.pareto_gap], dtype=torch.float64)
    torch.testing.assert_close(packed, host, equal_nan=True)


METHODS = {
    "adamw": AdamWStep(1e-2, weight_decay=0.1),
    "adamw without first moment": AdamWStep(1e-2),
    "sgd": SgdStep(0.1, weight_decay=0.1),
    "sgd nesterov": SgdStep(0.1, momentum=0.9, nesterov=True),
}


def copied(targets, dtype=None):
    def copies(tensors):
        return None if tensors is None else [t.to(dtype or t.dtype, copy=True) for t in tensors]

    first, second = copies(targets.first), copies(targets.second)
    return Targets(copies(targets.params), first, second, list(targets.steps))


def tensors_of(targets):
    return [*targets.params, *(targets.first or ()), *(targets.second or ())]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("K", range(1, 10))
@pytest.mark.parametrize("seed", SEEDS)
def test_update(kernels, K, seed, method):
    case = Case(K, seed, [FLOATS, ALL, [torch.bfloat16], [torch.float32]][(K + seed) % 4])
    step, adam = METHODS[method], method.startswith("adamw")
    if method == "adamw without first moment":
        step = AdamWStep(1e-2, second_weights=torch.rand(K, dtype=torch.float64))
    has_first = method in ("adamw", "sgd nesterov")
    weights = torch.randn(K, generator=case.generator, dtype=torch.float64)
    start = Targets(
        case.row(positive=True),
        case.row() if has_first else None,
        case.row(positive=True) if adam else None,
        [torch.tensor(3.0) for _ in case.sizes],
    )
    exact, moving = copied(start, torch.float64), None
    wide = [[None if t is None else t.double() for t in row] for row in case.gradients]
    if K < 9 and seed % 2:
        moving = RunningMeans([[t.float() for t in row] for row in case.lists(K)], 0.9)
    exact_moving = moving and RunningMeans([[t.double() for t in r] for r in moving.means], 0.9)
    expected = update_reference(wide, weights, exact, step, moving=exact_moving)
    ends = []

    def compute():
        targets = copied(start)
        means = moving and RunningMeans([[t.clone() for t in r] for r in moving.means], 0.9)
        changes = update_(case.gradients, weights, targets, step, moving=means, track=True)
        ends[:] = [targets, changes]
        return [
            *tensors_of(targets),
            changes,
            *(t for r in (means.means if means else ()) for t in r),
        ]

    in_every_order(kernels, compute)
    targets, changes = ends
    for ours, true in zip(tensors_of(targets), tensors_of(exact), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), true, rtol=eps, atol=eps * 1e-2 + 5e-6)
    moved = [p.double() - b.double() for p, b in zip(targets.params, start.params, strict=True)]
    for k, row in enumerate(wide):
        dots = [(u * x).sum() for u, x in zip(row, moved, strict=True) if u is not None]
        torch.testing.assert_close(changes[k], sum(dots), rtol=1e-5, atol=1e-4)
    assert torch.isfinite(expected).all()


def test_the_device_decides_whether_and_how_far_to_step(kernels):
    case, weights = Case(3, 0, FLOATS), torch.ones(3, dtype=torch.float64)
    start = Targets(case.row(), case.row(), case.row(True), [torch.ones(()) for _ in case.sizes])
    moved = copied(start)
    update_(case.gradients, weights, moved, AdamWStep(1e-2))
    for proceed, expected in ((torch.tensor(False), start), (torch.tensor(True), moved)):
        targets = copied(start)
        changes = _cuda.update(
            [t for row in case.gradients for t in row],
            weights,
            targets,
            _options(AdamWStep(123.0), None),
            lr=torch.tensor(1e-2, dtype=torch.float64),  # takes the place of the 123
            second_weights=None,
            means=None,
            beta=0.0,
            proceed=proceed,
            track=True,
        )
        assert all(map(torch.equal, tensors_of(targets), tensors_of(expected)))
        assert bool(changes.any()) is bool(proceed)


def test_stochastic_rounding_gives_the_bits_of_its_definition(kernels):
    case = Case(3, 1, [torch.bfloat16])
    # Exact in float32, so that no order of additions decides.
    for row in case.gradients:
        for t in row:
            if t is not None:
                t.copy_((4 * t).round() / 4)
    start = Targets(case.row(True), None, None, [torch.tensor(3.0) for _ in case.sizes])
    weights, seed = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64), 2**40 + 77
    step = SgdStep(2.0**-12)
    exact = copied(start)
    update_reference(case.gradients, weights, exact, step, rounding_seed=seed)

    def compute():
        targets = copied(start)
        update_(case.gradients, weights, targets, step, rounding_seed=seed)
        return targets.params

    for ours, true in zip(in_every_order(kernels, compute), exact.params, strict=True):
        assert torch.equal(ours, true)


def test_no_gradient_makes_no_change_of_an_infinite_step(kernels):
    g = [[torch.ones(20)], [None]]
    targets = Targets([torch.full((20,), 3e38)], None, None, [torch.ones(())])
    changes = update_(g, torch.ones(2).double(), targets, SgdStep(1e39), track=True)
    assert changes.tolist() == [-torch.inf, 0.0]


# ---- what takes minutes

FAULTS = {
    "a sum's barrier": (
        "cuda_lists.cuh", "  __syncthreads();\n  if (threadIdx.x % 32 == 0)",
        "  if (threadIdx.x % 32 == 0)",
    ),
    "the barrier after the ticket": (
        "cuda_lists.cuh", "gridDim.x - 1;\n  __syncthreads();", "gridDim.x - 1;",
    ),
    "the solver's barrier": (
        "gram_cuda.cu", "    __syncthreads();\n    values[me] = found", "    values[me] = found",
    ),
    "the barrier before a chunk's plan": (
        "update_cuda.cu", "    __syncthreads();\n    if (threadIdx.x == 0) {",
        "    if (threadIdx.x == 0) {",
    ),
    "threads that leave before a barrier": (
        "cuda_lists.cuh", "  if (!last) return false;",
        "  if (!last || threadIdx.x > 200) return false;",
    ),
    "sums before the last block has come": (
        "cuda_lists.cuh", "== gridDim.x - 1;", "== gridDim.x - 2;",
    ),
    "a vector beyond the end": (
        "gram_cuda.cu", "(chunk.end - chunk.begin) / kVector * kVector;\n  for",
        "(chunk.end - chunk.begin + kVector - 1) / kVector * kVector;\n  for",
    ),
}  # fmt: skip


def run_in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def sanitized(**environment):
    """The tests above on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True,
                       check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]  # fmt: skip
    return run_in_a_process(
        "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not soak", __file__,
        LD_PRELOAD=" ".join(libraries), MOLLM_EMULATED_FLAGS=" ".join(ADDRESSES),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1", **environment,
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    environment = {"MOLLM_EMULATED_FAULT": fault}
    if fault == "a vector beyond the end":
        done = sanitized(**environment)
    else:
        done = run_in_a_process(
            "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, **environment
        )
    assert done.returncode != 0, f"{fault} went by"


@pytest.mark.soak
def test_no_address_and_no_undefined_behaviour():
    done = sanitized()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.soak
@pytest.mark.parametrize("tests", ["tests/ops/test_gram.py", "tests/ops/test_update.py",
                                   "tests/optim/test_optimizer.py"])  # fmt: skip
def test_the_tests_of_the_cpu_with_the_kernels_behind_them(tests):
    done = run_in_a_process("tests/emulated_cuda.py", tests, "-k", "not 12 and not cuda")
    assert done.returncode == 0, done.stdout[-4000:]
