"""Parameter groups: the certificate holds with rates, β₂, ε and dtypes of their own."""

from __future__ import annotations

import optimizer_reference as twin
import pytest
import torch
from torch import nn

from mollm import MOLLMOptimizer
from mollm.optim.groups import relative_rates
from mollm_ops import Status, upgrad_weights

GROUPS = {
    "LoRA+": ({"lr": 1e-3}, {"lr": 16e-3}),
    "layer-wise": ({"lr": 1e-5}, {"lr": 1e-2}),
    "one at rest": ({"lr": 0.0}, {"lr": 1e-2}),
    "eps": ({"eps": 1e-8}, {"eps": 1.0}),
    "betas": ({"betas": (0.9, 0.999)}, {"betas": (0.9, 0.5)}),
    "all": ({"lr": 1e-4, "eps": 1e-3, "betas": (0.0, 0.9)}, {"lr": 1e-3, "weight_decay": 0.0}),
}


def parameters(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(5, dtype=torch.float64).to(dtype)) for _ in range(2)]


def conflicting(a, b, seed):
    """Three losses whose gradients nearly exclude each other."""
    torch.manual_seed(100 + seed)
    A = torch.randn(2, 10, dtype=torch.float64)
    f = torch.tanh(A @ torch.cat([a, b]).double())
    return {"forget": f[0], "kl": f[1] - 0.9 * f[0], "retain": 0.1 * (a * a + b * b).sum() - f[1]}


def step(opt, a, b, seed):
    opt.zero_grad()
    opt.backward(conflicting(a, b, seed))
    opt.step()
    return opt.last_step


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in GROUPS),
        *((name, {"base": "sgd"}) for name in ("LoRA+", "layer-wise", "one at rest")),
    ],
)
def test_every_update_is_the_one_that_the_certificate_speaks_of(name, options):
    first, second = GROUPS[name]
    descended = 0
    for seed in range(8):
        a, b = parameters(seed)
        groups = [{"params": [a], **first}, {"params": [b], **second}]
        opt = MOLLMOptimizer(groups, lr=1e-3, weight_decay=0.0, direction="dual", **options)
        lr = max(group["lr"] for group in opt.param_groups)
        for _ in range(6):
            s = step(opt, a, b, seed)
            expected = -lr * s.gram @ s.weights
            changes = torch.tensor(list(s.changes.values()), dtype=torch.float64)
            torch.testing.assert_close(changes, expected, rtol=1e-6, atol=1e-14)
            if s.status is Status.DUAL:
                assert not any(s.conflicts.values())
                descended += 1
    assert descended > 20


def test_groups_equal_their_twin_step_for_step():
    a, b = parameters(3)
    theta, state = [a.detach().clone(), b.detach().clone()], twin.State()
    opt = MOLLMOptimizer(
        [
            {"params": [a], "lr": 1e-3, "betas": (0.9, 0.9)},
            {"params": [b], "lr": 2e-2, "eps": 1e-2},
        ],
        lr=1.0,
        weight_decay=0.0,
    )
    for n in range(25):
        losses = conflicting(a, b, n).values()
        g = [list(torch.autograd.grad(loss, [a, b], retain_graph=True)) for loss in losses]
        G, w = twin.metric_adamw_step(
            theta,
            g,
            lambda gram: upgrad_weights(gram).weights,
            state,
            lr=[1e-3, 2e-2],
            beta2=[0.9, 0.999],
            eps=[1e-8, 1e-2],
        )
        s = step(opt, a, b, n)
        torch.testing.assert_close(s.gram, G, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(s.weights, w, rtol=1e-6, atol=1e-9)
        for p, t in zip((a, b), theta, strict=True):
            torch.testing.assert_close(p.detach(), t, rtol=1e-9, atol=1e-11)


def test_alike_groups_take_the_same_step_as_one():
    runs = []
    for split in (False, True):
        a, b = parameters(1, torch.float32)
        groups = [{"params": [a]}, {"params": [b], "weight_decay": 0.01}]
        opt = MOLLMOptimizer(groups if split else [a, b], lr=1e-2, weight_decay=0.01)
        for n in range(5):
            step(opt, a, b, n)
        runs.append([a.detach(), b.detach()])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_each_group_keeps_its_state_in_its_own_dtype():
    a, b, c = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(3))
    groups = [
        {"params": [a]},
        {"params": [b], "state_dtype": torch.float32},
        {"params": [c], "state_dtype": "float32"},
    ]
    opt = MOLLMOptimizer(groups, lr=1e-2, objectives=("one",))
    opt.backward({"one": (a * b * c).sum()})
    opt.step()
    assert [opt.state[p]["exp_avg_sq"].dtype for p in (a, b, c)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


def test_a_group_added_later_starts_at_its_own_first_step():
    a, b = parameters(2)
    opt = MOLLMOptimizer([a], lr=1e-3, weight_decay=0.0)
    b.requires_grad_(False)
    for n in range(3):
        step(opt, a, b, n)
    opt.add_param_group({"params": [b.requires_grad_(True)], "lr": 1e-2, "eps": 1e-4})
    start = b.detach().clone()
    s = step(opt, a, b, 3)
    torch.testing.assert_close(
        torch.tensor(list(s.changes.values())).double(), -1e-2 * s.gram @ s.weights
    )
    assert [float(opt.state[p]["step"]) for p in (a, b)] == [4.0, 1.0]
    assert not torch.equal(b.detach(), start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": float("nan")}, "weight_decay must not be negative, but got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite in float32, but got inf"),
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"eps": float("nan")}, "eps must not be negative"),
        ({"state_dtype": "int8"}, "state_dtype must be"),
        ({"lr": "1e-3"}, "lr must be a number, but got '1e-3'"),
        ({"maximize": True}, "must not have maximize, which base AdamW does not use"),
        ({"amsgrad": True}, "must not have amsgrad"),
        ({"momentum": 0.9}, "must not have momentum"),
        ({"direction": "dual"}, "direction must be the same for all parameter groups"),
    ],
)
def test_bad_options_of_a_group_are_refused_when_given_and_when_set(options, message):
    a, b = parameters(0)
    with pytest.raises(ValueError, match=message):
        MOLLMOptimizer([{"params": [a]}, {"params": [b], **options}])
    opt = MOLLMOptimizer([a])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [b], **options})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [b]})
    opt.backward(conflicting(a, b, 0))
    opt.param_groups[1].update(options)
    before = [a.detach().clone(), b.detach().clone()]
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(a.detach(), before[0])
    assert torch.equal(b.detach(), before[1])


def test_a_group_may_have_a_name_and_options_that_are_off():
    a, b = parameters(0)
    options = {"name": "head", "initial_lr": 1e-3, "maximize": False, "momentum": 0.0}
    opt = MOLLMOptimizer([{"params": [a]}, {"params": [b], **options}], lr=1e-2)
    step(opt, a, b, 0)
    assert opt.param_groups[1]["name"] == "head"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lrr", "lr"), ("weight_decy", "weight_decay"), ("beta", "betas"), ("learning_rate", "lr")],
)
def test_an_option_that_is_misspelt_is_refused(name, meant):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in "ab")
    words = f"must not have {name}, which nothing reads, but got 0.5: did you mean {meant}"
    with pytest.raises(ValueError, match=words):
        MOLLMOptimizer([{"params": [p], name: 0.5}])
    made = MOLLMOptimizer([{"params": [p], "lr_scale": 0.5, "initial_lr": 0.1}])
    with pytest.raises(ValueError, match=words):
        made.add_param_group({"params": [q], name: 0.5})
    assert len(made.param_groups) == 1


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_tags_of_groups_are_no_misspelt_options(base):
    tags = ("no_weight_decay", "use_weight_decay", "weight_decay_mult", "initial_lr", "lr_scale")
    tags += ("max_momentum", "base_momentum", "max_lr", "base_lr", "param_names", "layer_name")
    group = {"params": [torch.nn.Parameter(torch.ones(2))], **dict.fromkeys(tags, 0.5)}
    made = MOLLMOptimizer([group], base=base)
    assert [made.param_groups[0][tag] for tag in tags] == [0.5] * len(tags)


def test_a_group_of_sgd_cannot_have_the_betas_of_adam():
    a, b = parameters(0)
    with pytest.raises(ValueError, match="must not have betas, which base SGD does not use"):
        MOLLMOptimizer([{"params": [a]}, {"params": [b], "betas": (0.9, 0.99)}], base="sgd")


def test_relative_rates():
    assert relative_rates([{"lr": 2.0}, {"lr": 1.0}]) == [1.0, 0.5]
    assert relative_rates([{"lr": 0.0}, {"lr": 0.0}]) == [1.0, 1.0]
    assert relative_rates([{}, {}]) == [1.0, 1.0]
    assert relative_rates([{"lr": torch.tensor(4.0)}, {"lr": 1.0}]) == [1.0, 0.25]
