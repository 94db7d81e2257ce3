"""Gradients that are finite, but too large for the state: the step is skipped, never half taken."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from mollm import MOLLMOptimizer
from mollm_ops import Status

OPTIONS = [
    {},
    {"track_conflicts": False},
    {"metric": "euclidean"},
    {"momentum": "per-objective"},
    {"metric": "euclidean", "momentum": "per-objective"},
    {"direction": "dual"},
    {"direction": "sum"},
]
KERNELS = ["kernels", "plain Torch"]


@pytest.fixture(params=KERNELS)
def computed(request, monkeypatch):
    """By the extension, or by the definitions in plain Torch."""
    if request.param == "plain Torch":
        for name in ("mollm_ops.gram", "mollm_ops.update"):
            monkeypatch.setattr(import_module(name), "has_kernels_for", lambda device: False)
    return request.param


def hand_in(opt, p, gradients):
    for name, g in zip(opt.objectives, gradients, strict=True):
        with opt.objective(name):
            p.grad = g.to(p.dtype)


def gradients(objectives, scale=1.0):
    g = torch.randn(objectives, 40, generator=torch.Generator().manual_seed(4))
    g[0, 3] = scale
    return g


def make(objectives=3, dtype=torch.float32, **options):
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    names = [str(k) for k in range(objectives)]
    return p, MOLLMOptimizer([p], lr=1e-2, objectives=names, **options)


def overflowing(dtype):
    """A finite element that the state after the step cannot hold."""
    return 6e4 if dtype == torch.float16 else 1e30


def assert_skipped_and_goes_on(p, opt, big, objectives):
    hand_in(opt, p, gradients(objectives))
    opt.step()
    other, twin = copy.deepcopy((p, opt))
    before = copy.deepcopy((p.detach(), opt.state_dict()["state"]))
    with pytest.warns(UserWarning, match="gradients this large is not finite: the step was skip"):
        hand_in(opt, p, gradients(objectives, big))
        opt.step()
    assert opt.last_step.status is Status.NON_FINITE
    assert opt.last_step.changes is None
    assert opt.skipped_steps == 1
    assert torch.equal(p.detach(), before[0])
    assert str(opt.state_dict()["state"]) == str(before[1])
    for _ in range(2):
        for q, o in ((p, opt), (other, twin)):
            hand_in(o, q, gradients(objectives, 2.0))
            o.step()
    assert torch.equal(p.detach(), other.detach())
    assert not torch.equal(p.detach(), before[0])
    assert all(t.isfinite().all() for t in opt.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_that_would_overflow_the_state_is_skipped_and_counted(dtype, options, computed):
    p, opt = make(dtype=dtype, **options)
    assert_skipped_and_goes_on(p, opt, overflowing(dtype), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_adamw_as_base_is_kept_from_it_too(dtype):
    p, opt = make(dtype=dtype, base=torch.optim.AdamW)
    assert_skipped_and_goes_on(p, opt, 1e30, 3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_buffer_never_overflows(nesterov, computed):
    options = {"base": "sgd", "momentum": 0.9, "nesterov": nesterov, "direction": "sum"}
    p, opt = make(1, torch.float16, **options)
    opt.param_groups[0]["lr"] = 1e-6
    hand_in(opt, p, gradients(1, 4e4))
    opt.step()
    assert opt.skipped_steps == 0
    before = copy.deepcopy((p.detach(), opt.state[p]["momentum_buffer"]))
    hand_in(opt, p, gradients(1, 4e4))  # 0.9 * 4e4 + 4e4 is more than a float16 holds
    with pytest.warns(UserWarning, match="the step was skipped"):
        opt.step()
    assert opt.skipped_steps == 1
    assert torch.equal(p.detach(), before[0])
    assert torch.equal(opt.state[p]["momentum_buffer"], before[1])
    hand_in(opt, p, gradients(1, -4e4))
    opt.step()
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}], ids=str)
@pytest.mark.parametrize("objectives", range(1, 10))
def test_for_any_number_of_objectives(objectives, options, computed):
    p, opt = make(objectives, **options)
    assert_skipped_and_goes_on(p, opt, 1e30, objectives)


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_state_can_hold_is_not_skipped(dtype, options, computed):
    p, opt = make(dtype=dtype, **options)
    hand_in(opt, p, gradients(3, 7000.0 if dtype == torch.float16 else 8e18))
    opt.step()
    assert opt.skipped_steps == 0
    assert opt.state[p]["exp_avg_sq"].isfinite().all()
    assert opt.state[p]["exp_avg_sq"].max() > 1e3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_and_weights_stay_finite_whatever_finite_gradients_come(dtype, options):
    generator = torch.Generator().manual_seed(5)
    p, opt = make(dtype=dtype, **options)
    top = torch.tensor(torch.finfo(dtype).max).double().log10()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            most = torch.rand((), generator=generator) * min(top - 0.01, 25)
            exponents = most * torch.rand(3, 40, generator=generator)
            hand_in(opt, p, 10**exponents * torch.randn(3, 1, generator=generator).sign())
            opt.step()
            assert all(t.isfinite().all() for t in opt.state[p].values())
            assert p.isfinite().all()
    assert opt.skipped_steps < 60
    assert opt.skipped_steps > 0 or "momentum" in options  # whose means grow slowly


AFTER_AGGREGATE = [
    *(
        (options, change)
        for options in ({}, {"metric": "euclidean"}, {"base": torch.optim.AdamW})
        for change in ("clip", "none", "nan")
    ),
    ({"base": "sgd"}, "nan"),  # which keeps no state
    ({"base": "sgd", "momentum": 0.9}, "nan"),
]


@pytest.mark.parametrize(("options", "change"), AFTER_AGGREGATE)
def test_also_after_aggregate(options, change):
    p, opt = make(**options)
    hand_in(opt, p, gradients(3))
    opt.step()
    before = copy.deepcopy((p.detach(), opt.state_dict()["state"]))
    opt.zero_grad()
    hand_in(opt, p, gradients(3, 1.0 if change == "nan" else 1e20))
    opt.aggregate()
    if change == "clip":
        clip_grad_norm_([p], 1.0)
    if change == "nan":
        p.grad[0] = float("nan")
    with pytest.warns(UserWarning, match="is not finite: the step was skipped"):
        opt.step()
    assert opt.skipped_steps == 1
    assert torch.equal(p.detach(), before[0])
    assert str(opt.state_dict()["state"]) == str(before[1])


@pytest.mark.parametrize("options", [{}, {"momentum": "per-objective"}])
def test_a_direction_that_overflows_in_a_float16_grad(options):
    p, opt = make(2, torch.float16, base="sgd", direction="sum", **options)
    before = p.detach().clone()
    big = torch.zeros(2, 40)
    big[:, 0] = 6e4
    hand_in(opt, p, big)
    opt.aggregate()
    assert not p.grad.isfinite().all()
    with pytest.warns(UserWarning, match="is not finite: the step was skipped"):
        opt.step()
    assert torch.equal(p.detach(), before)


def test_it_can_raise_and_names_what_is_wrong():
    p, opt = make(on_nonfinite="raise")
    hand_in(opt, p, gradients(3, 1e20))
    with pytest.raises(FloatingPointError, match="the optimizer's state after a step along grad"):
        opt.step()
    opt.zero_grad()
    hand_in(opt, p, gradients(3, float("inf")))
    with pytest.raises(FloatingPointError, match="the gradient of 0 is not finite"):
        opt.step()
    opt.zero_grad()
    opt.rule = lambda gram, rule=opt.rule: rule(gram * float("nan"))
    hand_in(opt, p, gradients(3))
    with pytest.raises(FloatingPointError, match="the Gram matrix or its rule"):
        opt.step()
