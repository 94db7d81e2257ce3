"""The bases "adamw" and "sgd" as Torch optimizers: options, state, groups."""

from __future__ import annotations

import pytest
import torch

from mollm import MOLLMOptimizer
from mollm.optim.bases import SGD, AdamW


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in (5, (3, 4))]


def step(base, params):
    torch.manual_seed(1)
    g = [torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for p in params]
    return base.step_along(params, [g], torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    ],
)
def test_steps_and_state_are_torchs(ours, theirs, options):
    a, b = parameters(torch.float64), parameters(torch.float64)
    mine, other = ours(a, lr=0.1, **options), theirs(b, lr=0.1, **options)
    for _ in range(3):
        step(mine, a)
        torch.manual_seed(1)
        for p in b:
            p.grad = torch.randn(p.shape, dtype=torch.float64)
        other.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        for name, value in other.state[q].items():
            if value is not None:
                torch.testing.assert_close(mine.state[p][name].double(), value.double())


def test_groups_have_their_own_options_and_untouched_parameters_no_state():
    params = parameters()
    base = AdamW([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=0.1)
    before = [p.detach().clone() for p in params]
    step(base, params)
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    alone = AdamW(parameters())
    step(alone, alone.param_groups[0]["params"][:1])
    assert len(alone.state) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype_through_a_state_dict(dtype):
    params = parameters(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    base = AdamW(params, state_dtype=dtype)
    step(base, params)
    assert base.state[params[0]]["exp_avg"].dtype == dtype
    other = AdamW(params, state_dtype=dtype)
    saved = base.state_dict()
    other.load_state_dict(saved)
    other.restore_dtypes(saved)
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(other.state[p][name], base.state[p][name])
            assert other.state[p][name].data_ptr() != base.state[p][name].data_ptr()


def test_every_group_rounds_with_its_own_noise():
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    base = SGD([{"params": [p]} for p in params], lr=1e-3, stochastic_rounding=True)
    ones = [torch.ones(4096) for _ in params]
    base.step_along(params, [ones], torch.ones(1, dtype=torch.float64))
    assert not torch.equal(params[0], params[1])


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (AdamW, {"lr": -1.0}, "lr must not be negative, but got -1.0"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), but got"),
        (AdamW, {"eps": -1.0}, "eps must not be negative"),
        (AdamW, {"weight_decay": -1.0}, "weight_decay must not be negative"),
        (AdamW, {"state_dtype": torch.float16}, "state_dtype must be .* but got torch.float16"),
        (SGD, {"momentum": 1.0}, r"momentum must be in \[0, 1\), but got 1.0"),
        (SGD, {"nesterov": True}, "nesterov needs a momentum above 0"),
    ],
)
def test_bad_options(base, options, message):
    with pytest.raises(ValueError, match=message):
        base(parameters(), **options)


def test_a_second_moment_of_one_step_takes_no_state():
    torch.manual_seed(0)
    grads = [[torch.randn(5, 3) for _ in range(2)] for _ in range(4)]

    def stepped(base, betas, metric):
        p = torch.nn.Parameter(torch.ones(5, 3))
        opt = MOLLMOptimizer(
            [p], lr=0.1, objectives=("a", "b"), base=base, metric=metric, betas=betas, eps=1e-3
        )
        for each in grads:
            for name, g in zip(opt.objectives, each, strict=True):
                with opt.objective(name):
                    p.grad = g.clone()
            opt.step()
        return p, opt

    p, opt = stepped("adamw", (0.9, 0.0), "base")
    assert set(opt.state[p]) == {"step"}
    almost, _ = stepped("adamw", (0.9, 1e-30), "base")
    torch.testing.assert_close(p, almost)
    p, opt = stepped("adamw", (0.9, 0.0), "euclidean")
    assert set(opt.state[p]) == {"step", "exp_avg"}
    torchs, _ = stepped(torch.optim.AdamW, (0.9, 0.0), "euclidean")
    torch.testing.assert_close(p, torchs)
    other, fresh = stepped("adamw", (0.9, 0.0), "euclidean")
    fresh.load_state_dict(opt.state_dict())
    assert set(fresh.state[other]) == {"step", "exp_avg"}


@pytest.mark.parametrize("base", ["adamw", "sgd", torch.optim.SGD, torch.optim.AdamW], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_that_are_no_finite_numbers_are_refused(base, value):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="weight_decay must be a finite number in float32"):
        MOLLMOptimizer([p], base=base, weight_decay=value)


@pytest.mark.parametrize("base", ["adamw", torch.optim.SGD], ids=str)
@pytest.mark.parametrize("lr", [1e300, float("inf"), torch.tensor(float("nan"))])
def test_rates_that_float32_does_not_have_are_refused(base, lr):
    with pytest.raises(ValueError, match="lr must be a finite number in float32, but got"):
        MOLLMOptimizer([torch.nn.Parameter(torch.ones(2))], lr=lr, base=base)


def test_a_base_that_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="must make an Optimizer of Torch, but made None"):
        MOLLMOptimizer([torch.nn.Parameter(torch.ones(2))], base=lambda params, lr: None)
