"""MOLLMOptimizer: against its twin, as a Torch optimizer, and where bad input gets."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import optimizer_reference as twin
import pytest
import torch
from torch import nn

from mollm import MOLLMOptimizer
from mollm.optim.directions import DIRECTIONS
from mollm_ops import Status, upgrad_weights

NAMES = ("forget", "kl", "retain")


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def losses(model, x):
    y = model(x)
    return {
        "forget": y[:, 0].exp().mean(),
        "kl": (y[:, 1] - y[:, 0]).square().mean(),
        "retain": (y - 1).square().mean(),
    }


def batches(n, dtype=torch.float32, rows=8):
    gen = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 6, generator=gen, dtype=torch.float64).to(dtype) for _ in range(n)]


def train(model, opt, data):
    for x in data:
        opt.zero_grad()
        opt.backward(losses(model, x))
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- against the readable twin


def twin_train(data, dtype, step, **options):
    model = make_model(dtype)
    theta = [p.detach().double().clone() for p in model.parameters()]
    state = twin.State()
    for x in data:
        g = []
        for loss in losses(model, x).values():
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            g.append([t.double() for t in grads])
        d = twin.direction(g, lambda G: upgrad_weights(G).weights)
        step(theta, d, state, **options)
        with torch.no_grad():
            for p, t in zip(model.parameters(), theta, strict=True):
                p.copy_(t)
    return theta


@pytest.mark.parametrize("track", [True, False])
def test_sgd_equals_its_twin_step_for_step(track):
    model, data = make_model(torch.float64), batches(25, torch.float64)
    opt = MOLLMOptimizer(
        model.parameters(), lr=0.05, base="sgd", momentum=0.9, track_conflicts=track
    )
    expected = twin_train(data, torch.float64, twin.sgd_step, lr=0.05, mu=0.9)
    for p, t in zip(train(model, opt, data), expected, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-10, atol=1e-12)


def test_adamw_equals_its_twin_step_for_step():
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    model, data = make_model(torch.float64), batches(25, torch.float64)
    opt = MOLLMOptimizer(model.parameters(), metric="euclidean", **options)
    expected = twin_train(data, torch.float64, twin.adamw_step, **options)
    for p, t in zip(train(model, opt, data), expected, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-9, atol=1e-11)


def test_the_step_is_along_the_negative_of_the_weighted_gradients():
    model, x = make_model(torch.float64), batches(1, torch.float64)[0]
    before = [p.detach().clone() for p in model.parameters()]
    grads = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for loss in losses(model, x).values()
    ]
    opt = MOLLMOptimizer(model.parameters(), lr=0.5, base="sgd")
    opt.backward(losses(model, x))
    opt.step()
    w = opt.last_step.weights
    for n, (p, b) in enumerate(zip(model.parameters(), before, strict=True)):
        d = sum(w[k] * grads[k][n] for k in range(3))
        torch.testing.assert_close(p.detach(), b - 0.5 * d)


def gradients_of(model, x):
    g = []
    for loss in losses(model, x).values():
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        g.append([t.double() for t in grads])
    return g


def rule(gram):
    return upgrad_weights(gram).weights


@pytest.mark.parametrize("mode", ["momentum", "metric"])
def test_the_other_modes_equal_their_twins_step_for_step(mode):
    model, data = make_model(torch.float64), batches(25, torch.float64)
    theta = [p.detach().clone() for p in model.parameters()]
    state = twin.State()
    means = [[torch.zeros_like(t) for t in theta] for _ in NAMES]
    options = {"lr": 0.01, "eps": 1e-8, "betas": (0.9, 0.99), "weight_decay": 0.0}
    if mode == "momentum":
        means_of = {"momentum": "per-objective", "mean_beta": 0.8, "metric": "euclidean"}
        opt = MOLLMOptimizer(model.parameters(), **means_of, **options)
    else:
        opt = MOLLMOptimizer(model.parameters(), **options)
    for x in data:
        g = gradients_of(model, x)
        numbers = {"lr": 0.01, "beta2": 0.99, "eps": 1e-8}
        if mode == "momentum":
            twin.per_objective_adamw_step(theta, g, rule, state, means, beta=0.8, **numbers)
        else:
            twin.metric_adamw_step(theta, g, rule, state, **numbers)
        train(model, opt, [x])
        assert not any("exp_avg" in opt.state[p] for p in model.parameters())
        for p, t in zip(model.parameters(), theta, strict=True):
            torch.testing.assert_close(p.detach(), t, rtol=1e-8, atol=1e-10)


def test_in_adams_metric_the_update_really_applied_descends_on_every_objective():
    model, data = make_model(torch.float64), batches(25, torch.float64)
    opt = MOLLMOptimizer(model.parameters(), lr=1e-2, direction="dual", weight_decay=0.0)
    for x in data:
        train(model, opt, [x])
        s = opt.last_step
        assert s.status is Status.DUAL
        assert s.conflicts == dict.fromkeys(NAMES, False)
        # g_k · Δθ = −lr (Gᴾ w)_k, the certificate itself
        expected = -1e-2 * s.gram @ s.weights
        torch.testing.assert_close(torch.tensor(list(s.changes.values())).double(), expected)


def test_bfloat16_parameters_equal_the_twin_within_one_unit_in_the_last_place():
    data = batches(8, torch.bfloat16)
    model = make_model(torch.bfloat16)
    options = {"state_dtype": torch.float32, "weight_decay": 0.0, "metric": "euclidean"}
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, **options)
    state = twin.State()
    for x in data:
        theta = [p.detach().double() for p in model.parameters()]
        d = twin.direction(gradients_of(model, x), rule)
        numbers = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        twin.adamw_step(theta, d, state, lr=0.01, **numbers)
        train(model, opt, [x])
        for p, t in zip(model.parameters(), theta, strict=True):
            spacing = torch.finfo(torch.bfloat16).eps * t.abs().clamp(min=2**-20)
            assert ((p.detach().double() - t).abs() <= spacing).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": "per-objective"}, {"metric": "euclidean"}, {"base": "sgd", "momentum": 0.9}],
    ids=str,
)
def test_gradients_that_wait_on_the_host_give_the_same_run(options):
    data = batches(6)
    runs = []
    for memory in ("as-produced", "host"):
        model = make_model()
        opt = MOLLMOptimizer(model.parameters(), lr=0.01, gradient_memory=memory, **options)
        opt._store.bucket_bytes = 200
        train(model, opt, data)
        runs.append([p.detach() for p in model.parameters()])
        assert opt.last_step.changes is not None
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_that_wait_in_bfloat16_give_nearly_the_same_run():
    x = batches(1)
    model, rough = make_model(), make_model()
    train(model, MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd"), x)
    opt = MOLLMOptimizer(rough.parameters(), lr=0.1, base="sgd", gradient_memory="bfloat16")
    train(rough, opt, x)
    start, full, rounded = (
        torch.cat([p.detach().reshape(-1) for p in m.parameters()])
        for m in (make_model(), model, rough)
    )
    assert 0 < (rounded - full).norm() < 0.02 * (full - start).norm()


@pytest.mark.parametrize("base", ["adamw", torch.optim.AdamW])
def test_means_go_on_from_a_state_dict_and_survive_a_bad_gradient(base):
    data = batches(8)
    options = {"momentum": "per-objective", "base": base, "lr": 0.01, "betas": (0.0, 0.99)}
    model = make_model()
    whole = train(model, MOLLMOptimizer(model.parameters(), **options), data)

    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), **options)
    train(model, opt, data[:4])
    bad = losses(model, data[4])
    opt.zero_grad()
    opt.backward({**bad, "kl": bad["kl"] * float("nan")})
    with pytest.warns(UserWarning, match="kl is not finite"):
        opt.step()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    model = make_model()
    model.load_state_dict(saved[0])
    opt = MOLLMOptimizer(model.parameters(), **options)
    opt.load_state_dict(saved[1])
    assert equal(train(model, opt, data[4:]), whole)


@pytest.mark.parametrize("track", [True, False])
def test_aggregate_in_adams_metric_changes_nothing(track):
    data, runs = batches(6, torch.float64), []
    for aggregates in (False, True):
        model = make_model(torch.float64)
        opt = MOLLMOptimizer(model.parameters(), lr=0.01, track_conflicts=track)
        for x in data:
            opt.zero_grad()
            opt.backward(losses(model, x))
            if aggregates:
                opt.aggregate()
            opt.step()
        runs.append([p.detach() for p in model.parameters()])
        assert opt.last_step.conflicts == (dict.fromkeys(NAMES, False) if track else None)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_direction_cut_short_in_adams_metric_still_descends_on_every_objective():
    model, x = make_model(torch.float64), batches(1, torch.float64)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, weight_decay=0.0)
    opt.backward(losses(model, x))
    opt.aggregate()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    assert opt.last_step.conflicts == dict.fromkeys(NAMES, False)


def test_means_in_adams_metric_refuse_to_aggregate():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), momentum="per-objective")
    opt.backward(losses(model, x))
    with pytest.raises(RuntimeError, match="call step\\(\\) alone, or pass metric='euclidean'"):
        opt.aggregate()
    opt.step()


# ---- ways to hand in gradients


def test_contexts_equal_backward_and_accumulation_equals_one_batch():
    x = batches(1, rows=8)[0]

    def run(hand_in):
        model = make_model()
        opt = MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd")
        hand_in(model, opt)
        opt.step()
        return [p.detach() for p in model.parameters()]

    def by_context(model, opt):
        for name in NAMES:
            with opt.objective(name):
                losses(model, x)[name].backward()

    def in_two_micro_batches(model, opt):
        for half in x.split(4):
            for name in reversed(NAMES):
                with opt.objective(name):
                    (losses(model, half)[name] / 2).backward()

    reference = run(lambda model, opt: opt.backward(losses(model, x)))
    assert equal(run(by_context), reference)
    for a, b in zip(run(in_two_micro_batches), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_taken_over_and_lent_back_without_a_copy():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), objectives=("a", "b"))
    p = next(model.parameters())
    with opt.objective("a"):
        model(x).sum().backward()
        mine = p.grad
    assert p.grad is None
    with opt.objective("b"):
        assert p.grad is None
        model(x).mean().backward()
    with opt.objective("a"):
        assert p.grad is mine
        model(x).sum().backward()
        assert p.grad is mine


def test_parameters_that_an_objective_does_not_reach():
    a, b, unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = MOLLMOptimizer([a, b, unused], lr=0.1, base="sgd", objectives=("x", "y"))
    opt.backward({"x": (2 * a).sum(), "y": (3 * b).sum()})
    opt.step()
    assert (a < 1).all()
    assert (b < 1).all()
    assert unused.grad is None
    assert torch.equal(unused.detach(), torch.ones(3))


@pytest.mark.parametrize("base", ["sgd", torch.optim.SGD])
def test_grad_after_the_step(base):
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=0.1, base=base)
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward(losses(model, x))
    opt.step()
    for p, b in zip(model.parameters(), before, strict=True):
        if base == "sgd":
            assert p.grad is None  # the direction was never written
        else:
            torch.testing.assert_close(p.detach(), b - 0.1 * p.grad)
    opt.backward(losses(model, x))  # a used-up gradient is no obstacle
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_empties_the_objectives(set_to_none):
    model, data = make_model(), batches(2)
    opt = MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd")
    opt.backward(losses(model, data[0]))
    opt.zero_grad(set_to_none=set_to_none)
    with pytest.raises(RuntimeError, match="'forget' has no gradient"):
        opt.step()
    opt.backward(losses(model, data[1]))
    opt.step()
    fresh = make_model()
    other = MOLLMOptimizer(fresh.parameters(), lr=0.1, base="sgd")
    assert equal(train(fresh, other, data[1:]), [p.detach() for p in model.parameters()])


# ---- what a Torch optimizer promises


def test_any_base_class_scheduler_hooks_and_closure():
    model, data = make_model(), batches(4)
    opt = MOLLMOptimizer(
        model.parameters(), lr=0.1, base=torch.optim.RMSprop, direction="upgrad", alpha=0.9
    )
    schedule = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.5)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        opt.zero_grad()
        each = losses(model, data[0])
        opt.backward(each)
        return sum(v.item() for v in each.values())

    before = closure()
    assert opt.step(closure) == pytest.approx(before)
    schedule.step()
    assert calls == ["before", "after"]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - 0.5 / 5))
    assert opt.base.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_parameter_groups_keep_their_own_options():
    model, x = make_model(), batches(1)[0]
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    opt = MOLLMOptimizer(groups, lr=0.1, base="sgd")
    still = model[0].weight.detach().clone()
    opt.backward(losses(model, x))
    opt.step()
    assert torch.equal(model[0].weight.detach(), still)
    assert not torch.equal(model[2].weight.detach(), make_model()[2].weight.detach())


@pytest.mark.parametrize(("base", "torchs"), [("adamw", "AdamW"), ("sgd", "SGD")])
def test_options_of_torchs_own_bases_are_refused_with_the_way_out(base, torchs):
    with pytest.raises(TypeError, match=f"foreach.*pass base=torch.optim.{torchs}"):
        MOLLMOptimizer(make_model().parameters(), base=base, foreach=True)


def test_add_param_group():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model[0].parameters(), lr=0.1, base="sgd")
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    train(model, opt, [x])
    assert [g["lr"] for g in opt.base.param_groups] == [0.1, 0.2]
    assert not torch.equal(model[2].weight.detach(), make_model()[2].weight.detach())


@pytest.mark.parametrize("through", ["torch.save", "memory"])
def test_a_run_continues_bit_for_bit_from_its_state_dict(through):
    data = batches(10)
    model = make_model()
    whole = train(model, MOLLMOptimizer(model.parameters(), lr=0.01), data)

    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    train(model, opt, data[:5])
    saved = {"model": copy.deepcopy(model.state_dict()), "opt": copy.deepcopy(opt.state_dict())}
    if through == "torch.save":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)

    model = make_model()
    model.load_state_dict(saved["model"])
    opt = MOLLMOptimizer(model.parameters(), lr=123.0)
    opt.load_state_dict(saved["opt"])
    assert opt.base.state is opt.state
    assert equal(train(model, opt, data[5:]), whole)


def test_pickle_and_deepcopy():
    model, data = make_model(), batches(4)
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, direction="project")
    torch.optim.lr_scheduler.ConstantLR(opt)
    train(model, opt, data[:2])
    for clone in (lambda m: copy.deepcopy(m), lambda m: pickle.loads(pickle.dumps(m))):
        other_model, other = clone((model, opt))
        assert other.base.state is other.state
        mine = copy.deepcopy((model, opt))
        assert equal(train(other_model, other, data[2:]), train(*mine, data[2:]))


def test_two_runs_are_equal_bit_for_bit():
    def run():
        model = make_model()
        return train(model, MOLLMOptimizer(model.parameters(), lr=0.01), batches(10))

    assert equal(run(), run())


def test_clipping_between_aggregate_and_step():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=1.0, base="sgd")
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    opt.backward(losses(model, x))
    opt.aggregate()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)) > 1e-3
    opt.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_grad_scaler_unscales_and_skips():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor):
        opt.zero_grad()
        opt.backward({k: scaler.scale(v * factor) for k, v in losses(model, x).items()})
        opt.aggregate()
        scaler.step(opt)
        scaler.update()

    step(1.0)
    plain = make_model()
    expected = train(plain, MOLLMOptimizer(plain.parameters(), lr=0.1, base="sgd"), [x])
    for a, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)
    held = [p.detach().clone() for p in model.parameters()]
    step(float("inf"))
    assert equal([p.detach() for p in model.parameters()], held)
    assert scaler.get_scale() == 512.0


def test_a_torchjd_weighting_is_a_direction():
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = aggregation.UPGradWeighting()
    model, data = make_model(), batches(3)
    theirs = train(
        model,
        MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd", direction=weighting),
        data,
    )
    model = make_model()
    opt = MOLLMOptimizer(model.parameters(), lr=0.1, base="sgd", direction="upgrad")
    for a, b in zip(theirs, train(model, opt, data), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_of_other_dtypes(dtype):
    model, data = make_model(dtype), batches(3, dtype)
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, eps=1e-4)  # Adam's 1e-8 is 0 in float16
    train(model, opt, data)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


# ---- what the step says of itself


def test_last_step():
    model, x = make_model(torch.float64), batches(1, torch.float64)[0]
    opt = MOLLMOptimizer(model.parameters(), lr=1e-3, base="sgd", direction="dual")
    grads = [
        torch.cat([t.reshape(-1) for t in torch.autograd.grad(v, list(model.parameters()))])
        for v in (losses(model, x)[name] for name in NAMES)
    ]
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    train(model, opt, [x])
    moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
    M, s = torch.stack(grads), opt.last_step
    torch.testing.assert_close(s.gram, M @ M.T)
    torch.testing.assert_close(s.norms, M.norm(dim=1))
    unit = nn.functional.normalize(M)
    torch.testing.assert_close(s.cosines, unit @ unit.T)
    assert s.status is Status.DUAL
    assert 0 < s.pareto_gap <= 1
    assert s.conflicts == dict.fromkeys(NAMES, False)
    for name, g in zip(NAMES, grads, strict=True):
        assert s.changes[name] == pytest.approx(float(g @ moved), rel=1e-6)


def test_a_conflict_of_the_applied_update_is_seen():
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = MOLLMOptimizer([p], lr=0.1, base="sgd", objectives=("a", "b"), direction="sum")
    opt.backward({"a": 3 * p[0], "b": p[1] - p[0]})
    opt.step()
    assert opt.last_step.conflicts == {"a": False, "b": True}


def test_an_objective_with_a_zero_gradient_has_no_conflict():
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = MOLLMOptimizer([p], lr=0.1, base="sgd", objectives=("a", "b"))
    opt.backward({"a": 3 * p[0], "b": 0 * p[1]})
    opt.step()
    assert opt.last_step.conflicts == {"a": False, "b": False}
    assert opt.last_step.weights[1] == 0


def test_without_tracking_there_are_no_changes():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), track_conflicts=False)
    train(model, opt, [x])
    assert opt.last_step.changes is None
    assert opt.last_step.conflicts is None


# ---- bad input loses nothing and poisons nothing


def test_a_non_finite_gradient_is_skipped_counted_and_warned_of_once():
    model, data = make_model(), batches(6)
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    train(model, opt, data[:2])
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(opt.base.state_dict())
    words = "the gradient of kl is not finite: the step was skipped"
    with pytest.warns(UserWarning, match=words) as said:
        bad = losses(model, data[2])
        opt.zero_grad()
        opt.backward({**bad, "kl": bad["kl"] * float("nan")})
        opt.step()
    assert [warning.filename for warning in said] == [__file__]
    assert equal([p.detach() for p in model.parameters()], weights)
    assert str(opt.base.state_dict()) == str(state)
    assert opt.last_step.status is Status.NON_FINITE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad = losses(model, data[2])
        opt.zero_grad()
        opt.backward({**bad, "forget": bad["forget"] * float("inf")})
        opt.step()
    assert opt.skipped_steps == 2
    train(model, opt, data[3:])
    assert not equal([p.detach() for p in model.parameters()], weights)


def test_a_non_finite_gradient_can_raise():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters(), on_nonfinite="raise")
    bad = losses(model, x)
    opt.backward({**bad, "retain": bad["retain"] * float("nan")})
    with pytest.raises(FloatingPointError, match="the gradient of retain is not finite"):
        opt.step()
    assert equal([p.detach() for p in model.parameters()], list(make_model().parameters()))
    opt.zero_grad()
    opt.backward(losses(model, x))
    opt.step()


def test_errors_name_the_objective_and_the_way_out():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters())
    with (
        pytest.raises(ValueError, match="one of forget, kl, retain, but got 'forgt'"),
        opt.objective("forgt"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="'kl' got no gradient: call backward"),
        opt.objective("kl"),
    ):
        torch.ones(1, requires_grad=True).sum().backward()
    with pytest.raises(RuntimeError, match="'kl' was opened inside objective 'forget'"):
        with opt.objective("forget"), opt.objective("kl"):
            pass
    with pytest.raises(ValueError, match=r"but \['kl'\] are missing"):
        opt.backward({k: v for k, v in losses(model, x).items() if k != "kl"})
    with pytest.raises(RuntimeError, match="last_step is empty"):
        _ = opt.last_step
    opt.zero_grad()
    model(x).sum().backward()
    with (
        pytest.raises(RuntimeError, match="parameter 0 has a gradient of no objective"),
        opt.objective("kl"),
    ):
        pass
    assert model[0].weight.grad is not None


def test_an_exception_inside_an_objective_leaves_no_half_gradient():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters())
    with pytest.raises(KeyError), opt.objective("forget"):
        losses(model, x)["forget"].backward()
        raise KeyError("data ran out")
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="'forget' has no gradient"):
        opt.step()


def test_no_objective_may_open_between_aggregate_and_step():
    model, x = make_model(), batches(1)[0]
    opt = MOLLMOptimizer(model.parameters())
    opt.backward(losses(model, x))
    opt.aggregate()
    with pytest.raises(RuntimeError, match=r"opened after aggregate\(\)"), opt.objective("kl"):
        pass
    opt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ()}, "objectives must be distinct names"),
        ({"objectives": ("a", "a")}, "objectives must be distinct names"),
        ({"objectives": "forget"}, "objectives must be distinct names"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'skip' or 'raise', but got 'ignore'"),
        ({"base": "adam"}, "base must be 'adamw', 'sgd', or an optimizer class.*'adam'"),
        ({"direction": "best"}, "direction must be one of"),
        ({"length": "long"}, "length must be one of"),
        ({"metric": "adam"}, "metric must be 'base' or 'euclidean', but got 'adam'"),
        ({"momentum": "own"}, "momentum must be a number or 'per-objective', but got 'own'"),
        ({"gradient_memory": "disk"}, "memory must be one of"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MOLLMOptimizer(make_model().parameters(), **options)


# ---- on a GPU


@pytest.fixture
def cuda_step():
    """A model on the GPU, and a function that hands in the same gradients again."""
    model = make_model().cuda()
    params = list(model.parameters())
    torch.manual_seed(3)
    g = {name: [torch.randn_like(p) for p in params] for name in NAMES}

    def hand_in(opt, scale=1.0):
        for name in NAMES:
            with opt.objective(name):
                for p, t in zip(params, g[name], strict=True):
                    p.grad = t * scale

    return model, hand_in


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        *({"direction": direction} for direction in DIRECTIONS),
        {"direction": "pcgrad", "preferences": (1.0, 2.0, 3.0), "normalize": True},
        {"metric": "base"},
        {"momentum": "per-objective"},
        {"base": "sgd", "momentum": 0.9},
        {"lr": torch.tensor(0.01)},
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device(options, cuda_step):
    model, hand_in = cuda_step
    opt = MOLLMOptimizer(model.parameters(), **({"lr": 0.01} | options))
    hand_in(opt)
    opt.step()  # makes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            hand_in(opt)
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.last_step.status in (Status.DUAL, Status.MIN_NORM, Status.SOLVED)
    assert set(opt.last_step.conflicts) == set(NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"metric": "base"}, {"base": "sgd"}], ids=str)
def test_cuda_steps_equal_cpu_steps(options, cuda_step):
    model, hand_in = cuda_step
    other = make_model()
    g = {}
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, **options)
    twin_opt = MOLLMOptimizer(other.parameters(), lr=0.01, **options)
    for n in range(5):
        hand_in(opt, 1.0 + n)
        for name in NAMES:
            g[name] = [opt._store.get(name, p).cpu() for p in model.parameters()]
            with twin_opt.objective(name):
                for p, t in zip(other.parameters(), g[name], strict=True):
                    p.grad = t
        opt.step()
        twin_opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_bad_gradient_on_the_gpu_is_skipped_and_counted_without_waiting(cuda_step):
    model, hand_in = cuda_step
    opt = MOLLMOptimizer(model.parameters(), lr=0.01)
    hand_in(opt)
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(opt.state_dict()["state"])
    hand_in(opt, float("nan"))
    opt.step()
    torch.cuda.synchronize()
    assert equal([p.detach() for p in model.parameters()], before)
    assert str(opt.state_dict()["state"]) == str(state)
    assert opt.skipped_steps == 1
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        for _ in range(2):  # the count travels with one step and is read with the next
            torch.cuda.synchronize()
            hand_in(opt)
            opt.step()


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_is_captured_in_a_cuda_graph_and_replayed(direction, cuda_step):
    model, _ = cuda_step
    plain = copy.deepcopy(model)
    x = torch.randn(8, 6, device="cuda")
    opt = MOLLMOptimizer(model.parameters(), lr=0.01, direction=direction)
    other = MOLLMOptimizer(plain.parameters(), lr=0.01, direction=direction)

    def step(model, opt):
        opt.zero_grad()
        opt.backward(losses(model, x))
        opt.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, opt)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, opt)
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(plain, other)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-6)
