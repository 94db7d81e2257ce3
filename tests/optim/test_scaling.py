"""GradScaler and clipping between aggregate() and step()."""

from __future__ import annotations

import optimizer_reference as twin
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from mollm import MOLLMOptimizer
from mollm_ops import upgrad_weights

OPTIONS = [
    {},
    {"track_conflicts": False},
    {"metric": "euclidean"},
    {"metric": "euclidean", "track_conflicts": False},
    {"base": "sgd"},
    {"base": "sgd", "momentum": 0.9},
    {"base": torch.optim.AdamW},
    {"base": torch.optim.AdamW, "momentum": "per-objective", "betas": (0.0, 0.99)},
    {"metric": "euclidean", "momentum": "per-objective"},
    {"base": "sgd", "momentum": "per-objective"},
    {"gradient_memory": "host"},
]


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def losses(model, x):
    y = model(x)
    return {
        "forget": y[:, 0].exp().mean(),
        "kl": (y[:, 1] - y[:, 0]).square().mean(),
        "retain": (y - 1).square().mean(),
    }


def batches(n):
    gen = torch.Generator().manual_seed(2)
    return [torch.randn(8, 6, generator=gen) for _ in range(n)]


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def run(options, scale=None, growth=10**6, clip=None, data=None):
    """Where training ends, and the report of the last step."""
    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), lr=1e-2, **options)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, growth_interval=growth, enabled=scale is not None
    )
    for x in data or batches(8):
        opt.zero_grad()
        opt.backward({k: scaler.scale(v) for k, v in losses(model, x).items()})
        if scale or clip:
            opt.aggregate()
        if clip:
            scaler.unscale_(opt)
            clip_grad_norm_(model.parameters(), clip)
        scaler.step(opt)
        if scale:
            scaler.update()
    return flat(model), opt.last_step


@pytest.mark.parametrize("growth", [10**6, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_scale_of_a_grad_scaler_makes_no_difference(options, growth):
    plain, report = run(options)
    scaled, scaled_report = run(options, scale=65536.0, growth=growth)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scaled_report.gram, report.gram, rtol=1e-5, atol=1e-9)
    if options.get("track_conflicts", True):
        for name, change in report.changes.items():
            assert scaled_report.changes[name] == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("growth", [10**6, 2])
@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nor_does_it_together_with_clipping(options, clip, growth):
    plain, report = run(options, clip=clip)
    scaled, scaled_report = run(options, scale=1024.0, clip=clip, growth=growth)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)
    if options.get("track_conflicts", True):
        for name, change in report.changes.items():
            assert scaled_report.changes[name] == pytest.approx(change, rel=1e-3)


def test_the_changes_are_those_of_the_losses_themselves():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    before = {k: float(v.detach()) for k, v in losses(model, x).items()}
    opt.backward({k: scaler.scale(v) for k, v in losses(model, x).items()})
    opt.aggregate()
    scaler.step(opt)
    for name, loss in losses(model, x).items():
        assert opt.last_step.changes[name] == pytest.approx(
            float(loss.detach()) - before[name], rel=0.05
        )


def test_clipping_what_the_optimizer_lists_is_clipping_too():
    ends = []
    for listed in (False, True):
        model = make_model()
        opt = MOLLMOptimizer(model.parameters(), lr=1e-2)
        for x in batches(4):
            opt.zero_grad()
            opt.backward(losses(model, x))
            opt.aggregate()
            clip_grad_norm_(opt.param_groups[0]["params"] if listed else model.parameters(), 0.05)
            opt.step()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_a_step_that_the_scaler_skips_leaves_nothing_behind():
    data = batches(4)
    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), lr=1e-2)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1.0),
        torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for n, x in enumerate([data[0], data[1], data[1], data[2], data[3]]):
        opt.zero_grad()
        factor = float("inf") if n == 1 else 1.0
        opt.backward({k: scaler.scale(v * factor) for k, v in losses(model, x).items()})
        opt.aggregate()
        scaler.step(opt)
        scaler.update()
        for schedule in schedules:
            schedule.step()
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps == 0
    torch.testing.assert_close(flat(model), run({}, data=data)[0], rtol=1e-6, atol=1e-7)
    assert opt.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.parametrize("clip", [1e-1, 1e-3, 1e-5])
def test_clipping_shortens_a_step_in_adams_metric_no_more_than_torchs(clip):
    data = batches(8)
    lengths = []
    for limit in (None, clip):
        model = make_model()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.0, 0.999))
        for x in data:
            opt.zero_grad()
            sum(losses(model, x).values()).backward()
            if limit:
                clip_grad_norm_(model.parameters(), limit)
            opt.step()
        lengths.append(float((flat(model) - flat(make_model())).norm()))
    start = flat(make_model())
    mine = [float((run({}, clip=c)[0] - start).norm()) for c in (None, clip)]
    assert mine[1] / mine[0] > 0.9 * lengths[1] / lengths[0]


def test_clipped_steps_equal_their_twin_and_keep_the_certificate():
    data = [x.double() for x in batches(12)]
    model = make_model().double()
    theta = [p.detach().clone() for p in model.parameters()]
    opt = MOLLMOptimizer(
        model.parameters(), lr=1e-2, betas=(0.9, 0.9), weight_decay=0.0, direction="dual"
    )
    opt.rule = rule = lambda gram: upgrad_weights(gram)
    state = twin.State()
    for n, x in enumerate(data):
        g = [
            list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
            for loss in losses(model, x).values()
        ]
        clip = (1.0, 0.01, 0.5)[n % 3]
        c = opt._second_weights.sqrt()
        orthonormal = torch.eye(3, dtype=torch.float64)
        G, w = twin.metric_adamw_step(
            theta,
            g,
            lambda gram: c if torch.equal(gram, orthonormal) else rule(gram).weights,  # noqa: B023
            state,
            lr=1e-2,
            beta2=0.9,
            eps=1e-8,
            clip=clip,
        )
        opt.zero_grad()
        opt.backward(losses(model, x))
        opt.aggregate()
        for p in model.parameters():
            p.grad.mul_(clip)
        opt.step()
        s = opt.last_step
        torch.testing.assert_close(s.weights, w, rtol=1e-6, atol=1e-9)
        expected = -1e-2 * clip * G @ w
        torch.testing.assert_close(torch.tensor(list(s.changes.values())).double(), expected)
        for p, t in zip(model.parameters(), theta, strict=True):
            torch.testing.assert_close(p.detach(), t, rtol=1e-8, atol=1e-10)


def test_other_changes_to_the_gradient_change_the_direction_alone():
    x = batches(1)[0]
    moved = []
    for change in (
        lambda p: clip_grad_value_(p, 1e-3),
        lambda p: p[0].grad.zero_(),
        lambda p: setattr(p[0], "grad", None),
    ):
        model = make_model()
        params = list(model.parameters())
        opt = MOLLMOptimizer(params, lr=1e-2, weight_decay=0.0)
        opt.backward(losses(model, x))
        opt.aggregate()
        change(params)
        left = [None if p.grad is None else p.grad.clone() for p in params]
        opt.step()
        moved.append(
            [
                p.detach() - q.detach()
                for p, q in zip(params, make_model().parameters(), strict=True)
            ]
        )
        for d, delta in zip(left, moved[-1], strict=True):
            if d is None:
                assert not delta.any()
            else:
                assert torch.equal(delta.sign(), -d.sign())
    assert not moved[1][0].any()


def test_means_go_on_from_a_state_dict_that_was_saved_under_a_scaler():
    data = batches(6)
    options = {"metric": "euclidean", "momentum": "per-objective"}
    whole, _ = run(options, scale=1024.0, clip=0.5, data=data)
    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), lr=1e-2, **options)
    for n, x in enumerate(data):
        if n == 3:
            saved = opt.state_dict()
            opt = MOLLMOptimizer(model.parameters(), lr=1e-2, **options)
            opt.load_state_dict(saved)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        opt.zero_grad()
        opt.backward({k: scaler.scale(v) for k, v in losses(model, x).items()})
        opt.aggregate()
        scaler.unscale_(opt)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(opt)
    torch.testing.assert_close(flat(model), whole, rtol=1e-6, atol=1e-7)


def test_gradients_of_zero_are_clipped_to_zero():
    p = nn.Parameter(torch.ones(4))
    options = {"base": "sgd", "momentum": "per-objective", "objectives": ("a", "b")}
    opt = MOLLMOptimizer([p], lr=1e-2, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt.backward({name: scaler.scale((0 * p).sum()) for name in opt.objectives})
    opt.aggregate()
    scaler.unscale_(opt)
    clip_grad_norm_([p], 0.5)
    scaler.step(opt)
    assert opt.skipped_steps == 0
    assert torch.equal(p.detach(), torch.ones(4))
