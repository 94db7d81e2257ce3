"""Copies, saved states and foreign states: the algorithm stays, or the state is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mollm import MOLLMOptimizer
from mollm.errors import UsageError

OPTIONS = [
    {},
    {"metric": "euclidean"},
    {"momentum": "per-objective"},
    {"metric": "euclidean", "momentum": "per-objective"},
    {"base": "sgd", "momentum": 0.9},
    {"base": "sgd", "momentum": "per-objective"},
    {"base": torch.optim.AdamW},
    {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
]


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def train(model, opt, steps, first=0):
    for n in range(first, first + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(n))
        y = model(x.to(model[0].weight.dtype))
        opt.zero_grad()
        opt.backward({"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()})
        opt.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def optimizer(model, **options):
    return MOLLMOptimizer(model.parameters(), **({"lr": 1e-2, "objectives": ("a", "b")} | options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_like_the_original(options, copied):
    model = make_model()
    opt = optimizer(model, **options)
    train(model, opt, 3)
    others = copied((model, opt))
    assert torch.equal(train(*others, 3, first=3), train(model, opt, 3, first=3))
    mine, theirs = opt.state[model[0].weight], others[1].state[others[0][0].weight]
    assert sorted(mine) == sorted(theirs)
    assert others[1].base.param_groups is others[1].param_groups


class Halving(torch.optim.SGD):
    """A base that keeps a number where Torch's own copy loses it."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.factor = 1.0
        self.steps_taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * self.factor * p.grad
        self.factor /= 2
        self.steps_taken += 1


def test_a_copy_of_a_base_keeps_its_attributes():
    model = make_model()
    opt = optimizer(model, base=Halving)
    train(model, opt, 2)
    others = copy.deepcopy((model, opt))
    assert others[1].base.factor == 0.25
    assert others[1].base.steps_taken == 2
    assert torch.equal(train(*others, 2), train(model, opt, 2))


def test_a_copy_between_aggregate_and_step_has_no_parameter_too_many():
    model = make_model()
    opt = optimizer(model)
    y = model(torch.ones(2, 4))
    opt.backward({"a": y[:, 0].sum(), "b": y[:, 1].sum()})
    opt.aggregate()
    assert opt.state_dict()["param_groups"][0]["params"] == [0, 1, 2, 3]
    other_model, other = copy.deepcopy((model, opt))
    other.zero_grad()
    assert len(other.param_groups[0]["params"]) == 4
    train(other_model, other, 1)
    with pytest.raises(RuntimeError, match=r"between aggregate\(\) and step\(\)"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


# ---- the state of Torch's own optimizers, and back


def torch_trained(kind, model, **options):
    opt = kind(model.parameters(), lr=3e-3, **options)
    for n in range(3):
        opt.zero_grad()
        model(torch.full((2, 4), 1.0 + n).to(model[0].weight.dtype)).square().sum().backward()
        opt.step()
    opt.zero_grad()
    return opt


def test_torchs_adamw_continues_here_exactly_and_back():
    model, twin = make_model(), make_model()
    theirs, other = (torch_trained(torch.optim.AdamW, m) for m in (model, twin))
    opt = optimizer(model, objectives=("a",), direction="sum", metric="euclidean")
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert opt.param_groups[0]["lr"] == 3e-3

    def step(m, backward, o):
        o.zero_grad()
        backward(m(torch.ones(3, 4)).square().sum())
        o.step()

    for _ in range(3):
        step(model, lambda loss: opt.backward({"a": loss}), opt)
        step(twin, lambda loss: loss.backward(), other)
    back = torch.optim.AdamW(model.parameters(), lr=1.0)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        step(model, lambda loss: loss.backward(), back)
        step(twin, lambda loss: loss.backward(), other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-7)


def test_in_adams_metric_the_second_moment_of_torchs_adamw_is_taken_over_and_the_first_left():
    model = make_model()
    theirs = torch_trained(torch.optim.AdamW, model)
    opt = optimizer(model)
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
    state = opt.state[model[0].weight]
    assert sorted(state) == ["exp_avg_sq", "step"]
    assert torch.equal(state["exp_avg_sq"], theirs.state[model[0].weight]["exp_avg_sq"])
    train(model, opt, 2)
    assert float(state["step"]) == 5.0
    assert not any(opt.last_step.conflicts.values())


def test_torchs_sgd_continues_here_exactly():
    model, twin = make_model(), make_model()
    theirs, other = (torch_trained(torch.optim.SGD, m, momentum=0.9) for m in (model, twin))
    opt = optimizer(model, objectives=("a",), direction="sum", base="sgd", momentum=0.5)
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(3):
        opt.backward({"a": model(torch.ones(3, 4)).square().sum()})
        opt.step()
        other.zero_grad()
        twin(torch.ones(3, 4)).square().sum().backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-7)


def broken(change):
    def changed(state):
        change(state["state"][0])
        return state

    return changed


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, broken(lambda e: e.update(exp_avg_sq=torch.ones(3, 3))), "must have shape"),
        ({}, broken(lambda e: e.update(exp_avg_sq=torch.ones(5, 4).long())), "float dtype"),
        ({}, broken(lambda e: e.update(exp_avg_sq=[0.0])), "float dtype, but .* has list"),
        ({}, broken(lambda e: e.pop("exp_avg_sq")), "has no exp_avg_sq for parameter 0"),
        ({}, broken(lambda e: e.pop("step")), "step of parameter 0"),
        ({}, broken(lambda e: e.update(step=torch.tensor(-1.0))), "step of parameter 0"),
        ({}, broken(lambda e: e.update(step=torch.tensor(float("nan")))), "step of parameter 0"),
        ({}, broken(lambda e: e.update(step=torch.tensor(2.0**32))), "step of parameter 0"),
        (
            {},
            broken(lambda e: e["exp_avg_sq"][0].fill_(float("inf"))),
            "exp_avg_sq of parameter 0 must be finite, but .* has",
        ),
        (
            {},
            broken(lambda e: e["exp_avg_sq"][0].fill_(-1.0)),
            r"exp_avg_sq of parameter 0 must not be negative, but .* -1\.0",
        ),
        ({}, lambda s: {**s, "state": []}, "must hold state as a dict, but it holds list"),
        ({}, lambda s: {**s, "param_groups": None}, "must hold param_groups as a list"),
        ({}, lambda s: {**s, "param_groups": [3]}, "every group in the state to load must be"),
        ({}, lambda s: {**s, "state": {0: 3}}, "state of parameter 0 must be a dict"),
        ({}, lambda s: {**s, "mollm": 3}, "must hold mollm as a dict"),
        ({}, lambda s: {**s, "mollm": 0}, "must hold mollm as a dict"),
        ({}, lambda s: {**s, "mollm": None}, "must hold mollm as a dict"),
        ({}, lambda s: {**s, "mollm": []}, "must hold mollm as a dict"),
        ({}, lambda s: {**s, "mollm": ""}, "must hold mollm as a dict"),
        ({}, lambda s: {**s, "mollm": {"skipped_steps": -1}}, "skipped_steps in the state"),
        ({}, lambda s: {**s, "mollm": {"skipped_steps": 0.5}}, "must be an integer from 0"),
        ({}, lambda s: {**s, "mollm": {"grad_scale": 0.0}}, "grad_scale in the state"),
        (
            {},
            lambda s: {**s, "mollm": {"grad_scale": float("nan")}},
            "must be a positive finite number",
        ),
        (
            {"momentum": "per-objective"},
            lambda s: {**s, "mollm": {"means": {"steps": -1.0, "held": {}}}},
            "steps behind the means",
        ),
        (
            {"momentum": "per-objective"},
            lambda s: {**s, "mollm": {"means": {"steps": 1.0}}},
            "must have steps and held",
        ),
        ({}, broken(lambda e: e.update(row=torch.ones(3))), "has row for parameter 0"),
        (
            {"metric": "euclidean"},
            broken(lambda e: e.pop("exp_avg")),
            "has no exp_avg for parameter 0: it was saved with other settings of metric",
        ),
        (
            {},
            lambda s: {**s, "param_groups": [s["param_groups"][0] | {"betas": (0.9, 2.0)}]},
            "betas must be in",
        ),
        (
            {},
            lambda s: {**s, "param_groups": [s["param_groups"][0] | {"betas": (0.9,)}]},
            "betas must be two numbers, but",
        ),
        (
            {},
            lambda s: {**s, "param_groups": [s["param_groups"][0] | {"amsgrad": True}]},
            "was made with amsgrad=True",
        ),
        (
            {},
            lambda s: {
                **s,
                "param_groups": [
                    s["param_groups"][0] | {"decoupled_weight_decay": False, "weight_decay": 0.1}
                ],
            },
            "weight_decay=0.1 added to the gradient",
        ),
        (
            {"base": "sgd"},
            lambda s: {**s, "param_groups": [s["param_groups"][0] | {"nesterov": []}]},
            r"nesterov must be True or False, but got \[\]",
        ),
        ({}, lambda s: {**s, "param_groups": []}, "parameter group"),
        (
            {"momentum": "per-objective"},
            lambda s: {**s, "mollm": {"means": {"steps": 1.0, "held": {"c": {}}}}},
            "means of objective 'c'",
        ),
        (
            {"momentum": "per-objective"},
            lambda s: {**s, "mollm": {"means": {"steps": 1.0, "held": {"a": {9: torch.ones(1)}}}}},
            "a mean of parameter 9",
        ),
        (
            {"momentum": "per-objective"},
            lambda s: {**s, "mollm": {"means": {"steps": 1.0, "held": {"a": {0: torch.ones(1)}}}}},
            "the mean of objective 'a' of parameter 0 must have shape",
        ),
        (
            {},
            lambda s: {**s, "mollm": {"means": {"steps": 1.0, "held": {}}}},
            "load it with momentum='per-objective'",
        ),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_before_anything_is_changed(
    options, change, message
):
    model = make_model()
    opt = optimizer(model, **options)
    train(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(change(copy.deepcopy(before)))
    assert str(opt.state_dict()) == str(before)
    assert opt.base.state is opt.state
    train(model, opt, 1)


def test_the_state_of_another_kind_of_optimizer_is_refused():
    model = make_model()
    sgd = torch_trained(torch.optim.SGD, model, momentum=0.9)
    with pytest.raises(UsageError, match="not that of an AdamW"):
        optimizer(model).load_state_dict(sgd.state_dict())
    adam = torch_trained(torch.optim.AdamW, model)
    with pytest.raises(UsageError, match="not that of an SGD"):
        optimizer(model, base="sgd", momentum=0.9).load_state_dict(adam.state_dict())
    coupled = torch_trained(torch.optim.SGD, model, weight_decay=0.1)
    with pytest.raises(UsageError, match="added to the gradient"):
        optimizer(model, base="sgd").load_state_dict(coupled.state_dict())


def test_a_wider_state_is_cast_to_the_dtype_of_the_run_or_refused():
    model, half = make_model(), make_model(torch.float16)
    saved = torch_trained(torch.optim.AdamW, model).state_dict()
    opt = optimizer(half)
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.state[half[0].weight]["exp_avg_sq"].dtype == torch.float16
    saved["state"][0]["exp_avg_sq"][0, 0] = 1e6
    with pytest.raises(UsageError, match="exp_avg_sq of parameter 0 overflows"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_state_helpers_of_fsdp_carry_a_run_on(options):
    if options.get("momentum") == "per-objective":
        options = {**options, "mean_beta": 0.0}  # the helpers leave the means out
    model = make_model()
    opt = optimizer(model, **options)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, opt)))
    other = make_model()
    other.load_state_dict(saved[0])
    again = optimizer(other, **options | {"lr": 1.0})
    set_optimizer_state_dict(other, again, saved[1])
    assert again.param_groups[0]["lr"] == 1e-2
    assert torch.equal(train(other, again, 3, first=3), train(model, opt, 3, first=3))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state"][0]["exp_avg"].fill_(float("nan")),
        lambda s: s["state"][0].update(step=torch.tensor(float("inf"))),
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3, device="meta")),
        lambda s: s["param_groups"][0].update(eps=float("nan")),
        lambda s: s["state"][0].update(exp_avg=None),
        lambda s: s["state"][0].update(exp_avg_sq="x"),
    ],
)
def test_a_bad_state_of_another_base_is_refused_and_changes_nothing(change):
    p = nn.Parameter(torch.ones(3))
    optimizer = MOLLMOptimizer([p], base=torch.optim.AdamW, objectives=("a",))
    optimizer.backward({"a": p.sum()})
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises((UsageError, RuntimeError)):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, value in before["state"][0].items():
        assert torch.equal(after["state"][0][name], value)
    optimizer.backward({"a": p.sum()})
    optimizer.step()
    assert p.isfinite().all()
