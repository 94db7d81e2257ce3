"""Gradients and options that are valid Torch, and that few would give."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mollm.errors import UsageError
from mollm.optim.optimizer import MOLLMOptimizer

NAMES = ("forget", "kl", "retain")


def made(**options):
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    return MOLLMOptimizer(params, lr=0.1, **options), params


def lend(optimizer, params, view=lambda g: g):
    for k, name in enumerate(optimizer.objectives):
        with optimizer.objective(name):
            for p in params:
                p.grad = view(torch.full(p.shape, k + 1.0))


@pytest.mark.parametrize("eps", [0, 0.0, 1e-45, 1e-39])
def test_an_epsilon_with_which_an_idle_weight_is_lost_is_refused(eps):
    with pytest.raises(ValueError, match=r"eps must be at least 1\.2e-38"):
        made(eps=eps)
    optimizer, params = made(metric="euclidean", eps=1.2e-38, weight_decay=0.0)
    for name in NAMES:
        with optimizer.objective(name):
            params[0].grad = torch.zeros(2, 3)
            params[1].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(params[0], torch.ones(2, 3))
    assert bool((params[1] < 1).all())


VIEWS = {
    "negated": lambda g: torch._neg_view(-g),
    "in one place": lambda g: g.flatten()[0].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t() if g.ndim == 2 else g,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("memory", ["as-produced", "bfloat16"])
def test_a_gradient_may_be_a_view(view, track, memory):
    after = []
    for way in (lambda g: g, VIEWS[view]):
        optimizer, params = made(metric="euclidean", track_conflicts=track, gradient_memory=memory)
        for together in (False, True):
            lend(optimizer, params, way)
            if together:
                optimizer.aggregate()
            optimizer.step()
        after.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize(
    "function",
    [lambda g: {"x": g["kl"]}, lambda g: 3, lambda g: {"kl": None}, lambda g: {"kl": g["kl"][:0]},
     lambda g: {"kl": g["kl"].to("meta")}],
)  # fmt: skip
def test_gradients_change_to_gradients_or_not_at_all(function):
    optimizer, params = made()
    lend(optimizer, params)
    calls = []
    with pytest.raises(ValueError, match="gradients must be changed to"):
        optimizer.change_gradients(
            lambda g: calls.append(1) or (g if len(calls) == 1 else function(g))
        )
    optimizer.step()
    other, same = made()
    lend(other, same)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        (torch.optim.SGD, "weight_decay", math.nan), (torch.optim.SGD, "momentum", math.nan),
        (torch.optim.SGD, "lr", math.inf), (torch.optim.AdamW, "betas", (math.nan, 0.9)),
        (torch.optim.RMSprop, "eps", math.nan), ("adamw", "weight_decay", math.nan),
    ],
)  # fmt: skip
def test_a_group_whose_option_becomes_nan_makes_no_step(base, name, value):
    optimizer, params = made(base=base)
    lend(optimizer, params)
    optimizer.step()
    before = copy.deepcopy(params)
    optimizer.param_groups[0][name] = value
    lend(optimizer, params)
    with pytest.raises(ValueError, match=rf"{name} must (be|not)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("held", [{"kl": 3}, {"kl": None}, {"kl": {"x": torch.ones(2, 3)}}, 3])
def test_means_that_are_none_are_refused(held):
    optimizer, params = made(momentum="per-objective")
    lend(optimizer, params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["mollm"]["means"]["held"] = held
    with pytest.raises(UsageError, match="means"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", ["state", "param_groups"])
def test_a_state_that_lacks_a_part_is_refused(name):
    optimizer, _ = made()
    saved = optimizer.state_dict()
    del saved[name]
    with pytest.raises(UsageError, match=f"the state to load must hold {name}"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("metric", ["base", "euclidean"])
def test_a_weight_that_float32_does_not_hold_makes_no_step(base, metric):
    p = nn.Parameter(torch.ones(3))
    optimizer = MOLLMOptimizer([p], lr=0.1, base=base, metric=metric, direction="sum")
    optimizer.set_preferences([1e300, 1.0, 1.0])
    lend(optimizer, [p])
    with pytest.warns(UserWarning, match="the step was skipped"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert optimizer.skipped_steps == 1
    optimizer.set_preferences([1.0, 1.0, 1.0])
    lend(optimizer, [p])
    optimizer.step()
    assert bool((p < 1).all())
    wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MOLLMOptimizer([wide], lr=1e-300, base=base, metric=metric, weight_decay=0.0)
    optimizer.set_preferences([1e60, 1e60, 1e60])
    for name in NAMES:
        with optimizer.objective(name):
            wide.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("direction", ["pcgrad", "upgrad", "mgda"])
def test_a_gradient_of_next_to_nothing_poisons_nothing(direction):
    p = nn.Parameter(torch.ones(3))
    length = {} if direction == "pcgrad" else {"length": "min-norm"}
    optimizer = MOLLMOptimizer([p], lr=0.1, base="sgd", direction=direction, normalize=True,
                               momentum=0.9, **length)  # fmt: skip
    for _ in range(2):
        for name, size in zip(NAMES, (2e-45, 1.0, 1.0), strict=True):
            with optimizer.objective(name):
                p.grad = torch.tensor([1.0, -1.0, 0.5]) * size
        optimizer.step()
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("lr", [1e30, 3e38])
def test_a_rate_with_which_a_weight_would_be_infinite_makes_no_step(lr):
    p = nn.Parameter(torch.ones(3))
    optimizer = MOLLMOptimizer([p], lr=lr, base="sgd")
    for name in NAMES:
        with optimizer.objective(name):
            p.grad = torch.full((3,), 1e9)
    with pytest.warns(UserWarning, match="the step was skipped"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
