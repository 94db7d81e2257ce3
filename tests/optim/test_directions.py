"""Every direction as a rule on the Gram matrix, TorchJD's weightings among them."""

from __future__ import annotations

import pytest
import torch

from mollm.optim.directions import (
    DIRECTIONS,
    forget_first_weights,
    make_rule,
    pcgrad_weights,
    retain_first_weights,
)
from mollm_ops import Status


@pytest.fixture
def torchjd():
    pytest.importorskip("quadprog")
    return pytest.importorskip("torchjd.aggregation")


def rule(direction, K=3, preferences=None, normalize=False, length="mean"):
    return make_rule(
        direction, objectives=K, preferences=preferences, normalize=normalize, length=length
    )


def gram(K=3, D=10):
    g = torch.randn(K, D, dtype=torch.float64)
    return g, g @ g.T


def conflicting():
    g = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    return g, g @ g.T


def test_sum_is_the_weighted_sum():
    _, G = gram()
    assert rule("sum", preferences=[1, 2, 3])(G).weights.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("preferences", [(1, 1, 1, 1), (0.3, 20, 1, 2)])
def test_pcgrad_against_the_vectors_themselves(preferences):
    g, G = gram(4, 3)
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(4):
        h = preferences[i] * g[i]
        for j in range(4):
            if j != i and h @ g[j] < 0:
                h -= (h @ g[j]) / (g[j] @ g[j]) * g[j]
        total += h
    torch.testing.assert_close(pcgrad_weights(G, G.new_tensor(preferences)) @ g, total)


def test_upgrad_equals_torchjd(torchjd):
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector
    for seed in range(20):
        torch.manual_seed(seed)
        g, G = gram(3, 4)
        exactly = projector(norm_eps=0.0, reg_eps=1e-12)
        theirs = torchjd.UPGradWeighting(projector=exactly)(G)
        torch.testing.assert_close(rule("upgrad")(G).weights @ g, theirs @ g, rtol=1e-6, atol=1e-6)


def test_mgda_is_no_longer_than_torchjd(torchjd):
    for seed in range(20):
        torch.manual_seed(seed)
        g, G = gram(3, 4)
        theirs = torchjd.MGDAWeighting(epsilon=1e-9, max_iters=2000)(G) @ g
        weights = rule("mgda")(G).weights
        assert (weights >= 0).all()
        ours = weights / weights.sum() @ g
        assert float(ours.norm()) <= float(theirs.norm()) * (1 + 1e-9)
        # The shortest vector of a convex hull is in front of no other one of it.
        assert (g @ ours >= ours @ ours * (1 - 1e-9)).all()


def test_two_objective_pcgrad_equals_torchjd(torchjd):
    _, G = conflicting()
    torch.testing.assert_close(rule("pcgrad", K=2)(G).weights, torchjd.PCGradWeighting()(G))


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "sum"])
def test_a_conflict_is_resolved(direction):
    g, G = conflicting()
    d = rule(direction, K=2)(G).weights @ g
    assert (g @ d >= -1e-12).all()


def test_retain_first_takes_from_forgetting_only_what_harms():
    for seed in range(20):
        torch.manual_seed(seed)
        g, G = gram(3, 4)
        c = torch.rand(3, dtype=torch.float64) + 0.1
        kept = retain_first_weights(G, c) @ g - c[1] * g[1] - c[2] * g[2]
        # The optimality conditions of the nearest point of the cone {x : g_1 x, g_2 x >= 0}.
        slack = g[1:] @ kept
        multipliers = torch.linalg.lstsq(g[1:].T, (kept - c[0] * g[0])[:, None]).solution[:, 0]
        torch.testing.assert_close(multipliers @ g[1:], kept - c[0] * g[0], rtol=0, atol=1e-9)
        assert (slack > -1e-9).all()
        assert (multipliers > -1e-9).all()
        assert float((slack * multipliers).abs().max()) < 1e-9


def test_forget_first_against_the_vectors_themselves():
    for seed in range(20):
        torch.manual_seed(seed)
        g, G = gram(3, 4)
        c = torch.rand(3, dtype=torch.float64) + 0.1
        h = c[1] * g[1] + c[2] * g[2]
        if h @ g[0] < 0:
            h = h - (h @ g[0]) / (g[0] @ g[0]) * g[0]
        found = forget_first_weights(G, c) @ g
        torch.testing.assert_close(found, c[0] * g[0] + h)
        assert found @ g[0] > 0


@pytest.mark.parametrize("direction", ["retain-first", "forget-first"])
def test_who_comes_first_does_not_matter_where_nobody_is_harmed(direction):
    g = torch.eye(3, dtype=torch.float64)
    solution = rule(direction, preferences=[1, 2, 3])(g @ g.T)
    torch.testing.assert_close(solution.weights, torch.tensor([1.0, 2, 3], dtype=torch.float64))


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "dual"])
def test_normalized_rules_ignore_the_size_of_a_gradient(direction):
    g, _ = gram()
    big = g * torch.tensor([[1.0], [100.0], [0.01]], dtype=torch.float64)
    normal = rule(direction, normalize=True)

    def unit_direction(x):
        d = normal(x @ x.T).weights @ x
        return d / d.norm()

    torch.testing.assert_close(unit_direction(big), unit_direction(g))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_non_finite_gradients_give_zero_weights(direction):
    G = torch.eye(3, dtype=torch.float64)
    G[0, 0] = float("nan")
    solution = rule(direction)(G)
    assert solution.status is Status.NON_FINITE
    assert not solution.weights.any()


def test_a_callable_that_fails_to_return_weights():
    with pytest.raises(ValueError, match=r"direction must return a tensor of 3 weights, .*\(2,\)"):
        rule(lambda G: G[:2, 0])(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="but got list"):
        rule(lambda G: [1, 2, 3])(torch.eye(3, dtype=torch.float64))


def test_a_callable_with_non_finite_weights_is_refused():
    solution = rule(lambda G: G[0] / 0)(torch.eye(3, dtype=torch.float64))
    assert solution.status is Status.NON_FINITE
    assert not solution.weights.any()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"direction must be one of dual, project.*but got 'best'"):
        rule("best")
    with pytest.raises(ValueError, match="preferences must be None for direction 'dual'"):
        rule("dual", preferences=[1, 1, 1])
    with pytest.raises(ValueError, match=r"one entry per objective \(3\), but got 2"):
        rule("sum", preferences=[1, 1])
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match="length must be one of"):
            rule(direction, length="long")
    with pytest.raises(ValueError, match="finite and not negative"):
        rule("sum", preferences=[1, float("nan"), 1])
