"""The compiled solver against its NumPy twin, and both against what the mathematics promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mollm_ops import (
    Status,
    dual_space_weights,
    min_norm_weights,
    project_weights,
    upgrad_weights,
)
from mollm_ops.dual_space import LENGTHS, _run
from mollm_ops.reference import dual_space as reference

DEGENERACIES = ["random", "collinear", "opposite", "zero", "dependent", "duplicate", "tiny"]


def make_gradients(kind, K, D, seed, spread=2.0):
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((K, D)) * 10.0 ** rng.uniform(-spread, spread, (K, 1))
    if kind == "zero":
        g[0] = 0
    if kind == "tiny":
        g[0] *= 1e-9 / np.linalg.norm(g[0])
    if K > 1 and kind in ("collinear", "opposite", "duplicate"):
        factor = {"collinear": rng.uniform(0.1, 3), "opposite": -1.0, "duplicate": 1.0}[kind]
        g[1] = factor * g[0]
    if K > 2 and kind == "dependent":
        g[2] = g[0] + g[1]
    return g


problems = st.builds(
    make_gradients,
    kind=st.sampled_from(DEGENERACIES),
    K=st.integers(1, 8),
    D=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)


def certificate(g, weights):
    """The smallest cosine between Σ w g and a gradient that takes part."""
    d = weights @ g
    norms = np.linalg.norm(g, axis=1)
    part = (norms > 0) & (norms**2 >= 1e-12 * (norms**2).max())
    return float((g[part] @ d / norms[part]).min() / np.linalg.norm(d))


def assert_same_direction(ours, other, g):
    """Equal gap, status and Σ w g; equal gradients may share their weight in any way."""
    assert ours.pareto_gap == pytest.approx(other.pareto_gap, abs=1e-7)
    if other.pareto_gap <= 1e-5:
        return  # at a Pareto-stationary point rounding decides between 0 and a tiny direction
    assert ours.status == other.status
    a, b = (np.asarray(torch.as_tensor(s.weights).cpu()) @ g for s in (ours, other))
    assert np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(a), np.linalg.norm(b))


@settings(max_examples=2500, deadline=None)
@given(
    g=problems,
    rule=st.sampled_from(["dual", "mgda", "project", "upgrad"]),
    normalize=st.booleans(),
    length=st.sampled_from(LENGTHS),
)
def test_the_compiled_solver_equals_its_twin(g, rule, normalize, length):
    G = g @ g.T
    twin = reference.solve(G, rule, np.ones(len(G)), normalize=normalize, length=length)
    ours = _run(torch.from_numpy(G), rule, normalize=normalize, length=length)
    assert_same_direction(ours, twin, g)


@settings(max_examples=1500, deadline=None)
@given(g=problems)
def test_the_direction_descends_on_every_objective_or_says_that_none_does(g):
    solution = dual_space_weights(torch.from_numpy(g @ g.T))
    if solution.status in (Status.DUAL, Status.MIN_NORM):
        assert certificate(g, solution.weights.numpy()) > 1e-9
    else:
        assert solution.status is Status.STATIONARY
        assert not solution.weights.any()
        assert solution.pareto_gap <= 1e-6


@settings(max_examples=400, deadline=None)
@given(g=problems, normalize=st.booleans())
def test_projections_harm_no_objective(g, normalize):
    for solve in (project_weights, upgrad_weights):
        solution = solve(torch.from_numpy(g @ g.T), normalize=normalize)
        if solution.status is Status.SOLVED and solution.pareto_gap > 1e-5:
            assert certificate(g, solution.weights.numpy()) > -1e-7


@pytest.mark.parametrize("K", range(1, 9))
def test_formula_of_the_centre(K):
    g = torch.randn(K, 20, dtype=torch.float64)
    units = []
    for i in range(K):
        others = g[[j for j in range(K) if j != i]]
        basis = torch.linalg.qr(others.T).Q if K > 1 else g.new_zeros(20, 1)
        r = g[i] - basis @ (basis.T @ g[i])
        units.append(r / r.norm())
    centre = torch.stack(units).sum(0)
    tau = g.mean(0).norm()
    solution = dual_space_weights(g @ g.T)
    assert solution.status is Status.DUAL
    torch.testing.assert_close(solution.weights @ g, tau * centre / centre.norm())


@pytest.mark.parametrize("kind", DEGENERACIES)
@pytest.mark.parametrize("K", range(1, 9))
def test_rescaling_and_permuting_objectives(kind, K):
    g = make_gradients(kind, K, 10, seed=K)
    scale = np.random.default_rng(K).uniform(0.5, 2.0, (K, 1))
    order = np.random.default_rng(K).permutation(K)

    def direction(x):
        d = dual_space_weights(torch.from_numpy(x @ x.T)).weights.numpy() @ x
        return d / max(np.linalg.norm(d), 1e-300)

    np.testing.assert_allclose(direction(scale * g), direction(g), atol=1e-6)
    np.testing.assert_allclose(direction(g[order]), direction(g), atol=1e-6)


def test_lengths():
    g = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    expected = {
        "mean": g.mean(0).norm(),
        "first": g[0].norm(),
        "min-norm": (1 / (1 + 1 / 4 + 1 / 16)) ** 0.5,
    }
    for length, tau in expected.items():
        weights = dual_space_weights(g @ g.T, length=length).weights
        assert float((weights @ g).norm()) == pytest.approx(float(tau))


def test_opposite_gradients_are_stationary_and_zero_gradients_drop_out():
    stationary = dual_space_weights(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert (stationary.status, stationary.pareto_gap) == (Status.STATIONARY, 0.0)
    assert stationary.weights.tolist() == [0.0, 0.0]
    dropped = dual_space_weights(torch.diag(torch.tensor([4.0, 0.0, 1.0])))
    assert dropped.status is Status.DUAL
    assert dropped.weights[1] == 0
    assert (dropped.weights[[0, 2]] > 0).all()
    assert dual_space_weights(torch.zeros(3, 3)).status is Status.STATIONARY


def test_duplicate_gradients_fall_back_to_the_min_norm_point():
    solution = dual_space_weights(torch.ones(2, 2))
    assert solution.status is Status.MIN_NORM
    assert float(solution.weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solve", [dual_space_weights, min_norm_weights, project_weights])
def test_non_finite_entries(value, solve):
    gram = torch.eye(3)
    gram[1, 2] = gram[2, 1] = value
    solution = solve(gram)
    assert solution.status is Status.NON_FINITE
    assert solution.weights.tolist() == [0.0, 0.0, 0.0]


def test_more_objectives_than_the_compiled_solver_takes():
    g = torch.randn(20, 64, dtype=torch.float64)
    for solve in (dual_space_weights, min_norm_weights, project_weights, upgrad_weights):
        weights = solve(g @ g.T).weights.numpy()
        assert certificate(g.numpy(), weights) > -1e-7


def test_min_norm_point_of_a_known_triangle():
    g = torch.tensor([[2.0, 1.0], [2.0, -1.0], [9.0, 0.0]])
    solution = min_norm_weights(g @ g.T)
    torch.testing.assert_close(solution.weights, torch.tensor([0.5, 0.5, 0.0]).double())


def test_projection_leaves_a_harmless_sum_alone():
    gram = torch.tensor([[1.0, 0.2], [0.2, 3.0]])
    torch.testing.assert_close(
        project_weights(gram, [2.0, 5.0]).weights, torch.tensor([2.0, 5.0]).double()
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"square matrix, but got shape \(2, 3\)"):
        dual_space_weights(torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match="length must be one of mean, min-norm, first, but got 'x'"
    ):
        dual_space_weights(torch.eye(2), length="x")
    with pytest.raises(ValueError, match=r"one entry per objective \(2\), but got 1"):
        project_weights(torch.eye(2), [1.0])
    with pytest.raises(ValueError, match="finite and not negative"):
        project_weights(torch.eye(2), [1.0, -1.0])
    with pytest.raises(TypeError, match="floating dtype"):
        dual_space_weights(torch.eye(2, dtype=torch.int64))


def test_solve_opcheck():
    args = (torch.eye(3, dtype=torch.float64), "dual", [1.0] * 3, False, "mean")
    torch.library.opcheck(torch.ops.mollm.solve.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DEGENERACIES)
@pytest.mark.parametrize("K", range(1, 9))
def test_the_device_solver_equals_the_host_solver(kind, K):
    g = make_gradients(kind, K, 10, seed=K)
    gram = torch.from_numpy(g @ g.T)
    for solve in (dual_space_weights, min_norm_weights, project_weights, upgrad_weights):
        here, there = solve(gram), solve(gram.cuda())
        assert_same_direction(here, there, g)


def test_other_weights_keep_the_verdict():
    weights = torch.tensor([3.0, 4.0])
    solution = dual_space_weights(torch.eye(2))
    other = solution.with_weights(weights)
    assert other.weights.tolist() == [3, 4]
    assert (other.status, other.pareto_gap) == (solution.status, solution.pareto_gap)
    refused = dual_space_weights(torch.full((2, 2), float("nan"))).with_weights(weights)
    assert refused.weights.tolist() == [0, 0]
    assert refused.status is Status.NON_FINITE
