"""Sizes at the ends of float32, memory that overlaps, autograd, and threads that cannot be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mollm_ops import (
    Status,
    combine,
    dots,
    dual_space_weights,
    gram,
    gram_moved,
    min_norm_weights,
    project_weights,
    update_,
    upgrad_weights,
)
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, SgdStep, Targets
from mollm_ops.reference.gram import gram_reference, scaled_by_metric_reference

ROOT = Path(__file__).resolve().parents[2]
SIZES = [1e-25, 1e-19, 1.0, 1e19, 1e20]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def relative_error(G, exact):
    norms = exact.diagonal().sqrt()
    return float(((G - exact) / (norms[:, None] * norms)).abs().max())


# ---- sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_gram_of_any_size_that_a_float_has(K, size, dtype, device):
    g = [[(size * torch.randn(s)).to(device, dtype) for s in (70_001, 5)] for _ in range(K)]
    assert relative_error(gram(g), gram_reference(g)) <= 2e-7
    moving = RunningMeans([[torch.zeros_like(t) for t in ts] for ts in g], 0.0)
    # The means are of the gradients' dtype, and are rounded to it.
    bound = 3e-3 if dtype == torch.bfloat16 else 2e-7
    assert relative_error(gram_moved(g, moving), gram_reference(g)) <= bound


def test_gram_of_gradients_of_different_sizes(device):
    g = [[(size * torch.randn(70_001)).to(device)] for size in SIZES]
    assert relative_error(gram(g), gram_reference(g)) <= 2e-7


def test_one_huge_element_among_ordinary_ones(device):
    g = [[torch.randn(70_001, device=device)] for _ in range(2)]
    g[0][0][123] = 1e20
    assert relative_error(gram(g), gram_reference(g)) <= 2e-7


def test_zero_gradients_stay_zero_and_infinities_stay_seen(device):
    ordinary = torch.randn(70_001, device=device)
    G = gram([[torch.zeros_like(ordinary)], [ordinary]])
    assert G[0].tolist() == [0.0, 0.0]
    ordinary[5] = float("inf")
    assert not gram([[ordinary]]).isfinite().any()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e18])
def test_adams_metric_of_any_size(size, device):
    g = [[size * torch.randn(5_000, device=device)] for _ in range(2)]
    v = [torch.zeros(5_000, device=device)]
    steps = [torch.ones((), device=device)]
    metric = AdamMetric(v, steps, torch.full((2,), 0.5, dtype=torch.float64, device=device))
    exact = gram_reference(scaled_by_metric_reference(g, metric))
    assert relative_error(gram_moved(g, None, metric), exact) <= 1e-6


# ---- the solver


def opposite(K, dimensions, scale):
    g = torch.randn(K, dimensions, dtype=torch.float64)
    g[1] = -scale * g[0]
    return g @ g.T


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("K", [2, 3, 5, 9])
def test_opposite_gradients_are_stationary_for_every_rule(K, normalize):
    for solve in (project_weights, upgrad_weights, min_norm_weights):
        for scale in (1.0, 0.3, 3.7):
            solution = solve(opposite(K, 20, scale), normalize=normalize)
            assert solution.status is Status.STATIONARY, solution
            assert not solution.weights.any()


def test_the_first_length_is_that_of_the_first_gradient_that_takes_part():
    G = torch.diag(torch.tensor([0.0, 4.0, 1.0], dtype=torch.float64))
    for K in (3, 9):
        wide = torch.zeros(K, K, dtype=torch.float64)
        wide[:3, :3] = G
        solution = dual_space_weights(wide, length="first")
        assert solution.status is Status.DUAL
        assert float((solution.weights @ wide @ solution.weights).sqrt()) == pytest.approx(2.0)


def test_a_direction_without_a_length_is_stationary():
    G = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])
    for solve in (dual_space_weights, min_norm_weights, project_weights, upgrad_weights):
        solution = solve(G, length="mean")
        assert solution.status is Status.STATIONARY
        assert not solution.weights.any()


# ---- memory that overlaps


def test_out_may_be_a_gradient_but_not_a_part_of_one(device):
    base = torch.randn(12, device=device)
    w = torch.ones(2, dtype=torch.float64)
    g = [[base[:8]], [torch.ones(8, device=device)]]
    for out in (base[1:9], base[4:], torch.zeros(1, device=device).expand(8)):
        before = base.clone()
        with pytest.raises(ValueError, match=r"out\[0\] must not"):
            combine(g, w, out=[out])
        assert torch.equal(base, before)
    expected = base[:8] + 1
    assert torch.equal(combine(g, w, out=[base[:8]])[0], expected)


def test_out_may_lie_between_the_elements_of_a_gradient():
    base = torch.randn(6, 8)
    expected = base[:, :4] + 1
    combine([[base[:, :4]], [torch.ones(6, 4)]], torch.ones(2), out=[base[:, 4:]])
    torch.testing.assert_close(base[:, 4:], expected)
    with pytest.raises(ValueError, match="must not share memory"):
        combine([[base[:, :4]]], torch.ones(1), out=[base[:, 2:6]])


def test_out_of_one_parameter_is_no_gradient_of_another():
    a, b = torch.randn(5), torch.randn(5)
    with pytest.raises(ValueError, match=r"out\[1\] must not share memory with gradients\[0\]"):
        combine([[a, b]], torch.ones(1), out=[torch.empty(5), a])
    with pytest.raises(ValueError, match=r"out\[0\] must not share memory with out\[1\]"):
        combine([[a, b]], torch.ones(1), out=[a, a])


def test_what_an_update_writes_is_apart():
    base, g, w = torch.zeros(10), torch.ones(6), torch.ones(1, dtype=torch.float64)
    step = [torch.ones(())]
    for first in (base[4:], base[:6]):
        with pytest.raises(ValueError, match=r"must not share memory with targets\.first"):
            update_([[g]], w, Targets([base[:6]], [first], None, step), SgdStep(1.0, 0.9))
    with pytest.raises(ValueError, match="must not share memory with gradients"):
        update_([[base[4:]]], w, Targets([base[:6]], None, None, step), SgdStep(1.0))
    assert not base.any()


# ---- autograd


def test_a_gram_matrix_is_a_constant_to_autograd():
    x = torch.randn(5, requires_grad=True)
    G = gram([[x], [2 * x]])
    assert not G.requires_grad
    assert not dots([[x]], [x]).requires_grad


@pytest.mark.parametrize(
    "f",
    [
        lambda x: gram([[x]])[0, 0],
        lambda x: dots([[torch.ones(5)]], [x])[0],
        lambda x: combine([[x]], torch.ones(1))[0].sum(),
        lambda x: gram_moved([[x]])[0, 0],
        lambda x: dual_space_weights(x.sum().reshape(1, 1)).weights[0],
    ],
)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_transforms_are_refused_rather_than_zero(f, transform):
    with pytest.raises(RuntimeError, match=r"outside torch\.func.s transforms"):
        transform(f)(torch.randn(5, 5) if transform is torch.func.vmap else torch.randn(5))


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(RuntimeError, match="forward-mode autograd"):
            gram([[x]])


# ---- what the step must not be told


def test_a_state_of_another_shape_is_named():
    p, w = torch.zeros(4, 4), torch.ones(1, dtype=torch.float64)
    targets = Targets([p], None, [torch.ones(3)], [torch.ones(())])
    with pytest.raises(ValueError, match=r"targets.second\[0\] must have shape \(4, 4\)"):
        update_([[torch.ones(4, 4)]], w, targets, AdamWStep(0.1))
    metric = AdamMetric([torch.ones(3)], [torch.ones(())], w)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] must have shape \(4, 4\)"):
        gram_moved([[torch.ones(4, 4)]], None, metric)


def test_weights_and_steps_are_counted():
    p, g, w = torch.zeros(4), torch.ones(4), torch.ones(2, dtype=torch.float64)
    few = AdamWStep(0.1, second_weights=torch.ones(1, dtype=torch.float64))
    targets = Targets([p], None, [torch.ones(4)], [torch.ones(())])
    with pytest.raises(ValueError, match=r"second_weights must have one entry per list .* \(2\)"):
        update_([[g], [g]], w, targets, few)
    with pytest.raises(ValueError, match=r"targets.steps must have one tensor per parameter"):
        update_([[g], [g]], w, Targets([p], None, None, []), SgdStep(0.1))
    with pytest.raises(ValueError, match=r"targets.steps\[0\] must be one number"):
        update_([[g], [g]], w, Targets([p], None, None, [torch.empty(0)]), SgdStep(0.1))
    assert not p.any()


# ---- threads

# Stands before the system's own, and refuses all threads but the first few once it is told to.
THREADS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
int allowed = 1 << 30;
int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* x) {
  if (allowed-- <= 0) return EAGAIN;
  int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  *(void**)&real = dlsym(RTLD_NEXT, "pthread_create");
  return real(t, a, f, x);
}
"""
FEW_THREADS = """
import ctypes, torch
from mollm_ops import gram
torch.set_num_threads(1)
g = [[torch.randn(4_000_000)] for _ in range(2)]
expected = gram(g)
torch.set_num_threads(8)
for allowed in (0, 1, 3):
    left = ctypes.c_int.in_dll(ctypes.CDLL(None), "allowed")
    left.value = allowed
    assert torch.equal(gram(g), expected)
    assert left.value < 0, "no thread was refused"
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, which is not on PATH")
def test_a_thread_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "threads.c").write_text(THREADS)
    library = tmp_path / "threads.so"
    source = str(tmp_path / "threads.c")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", str(library), "-ldl"], check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
