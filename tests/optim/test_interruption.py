"""A step that fails: everything as before, or everything refused. And gradients of nobody."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from mollm import MOLLMOptimizer

OPTIONS = [
    {},
    {"metric": "euclidean"},
    {"momentum": "per-objective"},
    {"metric": "euclidean", "momentum": "per-objective"},
    {"base": "sgd", "momentum": 0.9},
    {"base": torch.optim.AdamW},
]


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    return model, MOLLMOptimizer(groups, lr=1e-2, objectives=("a", "b"), **options)


def backward(model, opt):
    y = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    opt.backward({"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()})


def step(model, opt):
    opt.zero_grad()
    backward(model, opt)
    opt.step()


def snapshot(model, opt):
    return copy.deepcopy((list(model.state_dict().values()), str(opt.state_dict())))


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def failing_rule(gram, rule, failures):
    if failures:
        raise failures.pop()
    return rule(gram)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["hook", "rule", "closure", "hook of the base"])
def test_a_step_that_fails_before_it_writes_changes_nothing(where, options):
    model, opt = make(**options)
    step(model, opt)
    before = snapshot(model, opt)
    failures = [KeyboardInterrupt()]

    def fail(*args):
        if failures:
            raise failures.pop()

    backward_again = functools.partial(backward, model, opt)
    closure = None
    opt.zero_grad()
    backward_again()
    if where == "hook":
        opt.register_step_pre_hook(fail)
    elif where == "rule":
        opt.rule = functools.partial(failing_rule, rule=opt.rule, failures=failures)
    elif where == "closure":
        closure = fail
    else:
        opt.base.register_step_pre_hook(fail)
        if "base" not in options or options["base"] == "sgd":
            failures.clear()  # the fused bases' own step is not called
            return
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same(snapshot(model, opt), before)
    twin_model, twin = make(**options)
    step(twin_model, twin)
    for m, o in ((model, opt), (twin_model, twin)):
        step(m, o)
    assert same(snapshot(model, opt), snapshot(twin_model, twin))


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_a_step_that_is_interrupted_while_it_writes_voids_the_model(options, monkeypatch):
    import mollm.optim.bases as bases

    model, opt = make(**options)
    step(model, opt)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    update, calls = bases.update_, []

    def second_group_fails(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return update(*args, **kwargs)

    monkeypatch.setattr(bases, "update_", second_group_fails)
    backward(model, opt)
    with (
        pytest.warns(UserWarning, match="weights and optimizer state are void"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        opt.step()
    for refused in (opt.step, opt.aggregate, opt.state_dict, lambda: backward(model, opt)):
        with pytest.raises(RuntimeError, match="load both from a checkpoint"):
            refused()
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    twin_model, twin = make(**options)
    step(twin_model, twin)
    for m, o in ((model, opt), (twin_model, twin)):
        step(m, o)
    assert same(snapshot(model, opt), snapshot(twin_model, twin))


def test_another_base_that_fails_while_it_writes_voids_the_model():
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            p = self.param_groups[0]["params"][0]
            p -= p.grad
            raise MemoryError

    model, opt = make(base=Failing)
    backward(model, opt)
    with pytest.warns(UserWarning, match="are void"), pytest.raises(MemoryError):
        opt.step()
    with pytest.raises(RuntimeError, match="load both from a checkpoint"):
        opt.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_aggregate_that_fails_drops_the_gradients_alone(options, monkeypatch):
    if options == {"momentum": "per-objective"}:
        options = {"base": "sgd", "momentum": "per-objective"}
    import mollm.optim.optimizer as module

    model, opt = make(**options)
    step(model, opt)
    before = snapshot(model, opt)
    opt.zero_grad()
    backward(model, opt)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(module, "combine", fails)
        with pytest.raises(torch.OutOfMemoryError):
            opt.aggregate()
    assert same(snapshot(model, opt), before)
    assert all(p.grad is None for p in model.parameters())
    step(model, opt)


# ---- between aggregate() and step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_second_aggregate_changes_nothing(options):
    if options == {"momentum": "per-objective"}:
        options = {"base": "sgd", "momentum": "per-objective"}
    runs = []
    for times in (1, 3):
        model, opt = make(**options)
        for _ in range(3):
            opt.zero_grad()
            backward(model, opt)
            for _ in range(times):
                opt.aggregate()
            opt.step()
        runs.append(snapshot(model, opt))
    assert same(*runs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_direction_that_was_thrown_away_is_no_step(options):
    if options == {"momentum": "per-objective"}:
        options = {"base": "sgd", "momentum": "per-objective"}
    model, opt = make(**options)
    step(model, opt)
    before = snapshot(model, opt)
    opt.zero_grad()
    backward(model, opt)
    opt.aggregate()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient any more"):
        opt.step()
    assert same(snapshot(model, opt), before)
    step(model, opt)


@pytest.mark.parametrize("base", ["adamw", "sgd", torch.optim.SGD])
def test_a_gradient_of_no_objective_is_refused_wherever_it_comes(base):
    model, opt = make(base=base)
    step(model, opt)
    for call in (opt.step, opt.aggregate):
        opt.zero_grad()
        backward(model, opt)
        model(torch.ones(1, 4)).sum().backward()
        before = snapshot(model, opt)
        with pytest.raises(RuntimeError, match="has a gradient of no objective"):
            call()
        assert same(snapshot(model, opt), before)
    step(model, opt)


def test_what_another_base_left_in_the_gradient_moves_no_parameter_again():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = MOLLMOptimizer([p, q], lr=0.1, objectives=("a",), base=torch.optim.SGD)
    opt.backward({"a": p.sum() + q.sum()})
    opt.step()
    held = q.detach().clone()
    opt.backward({"a": p.sum()})
    opt.step()
    assert torch.equal(q.detach(), held)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_at_learning_rate_0_moves_moments_and_no_weights(options):
    model, opt = make(**options)
    step(model, opt)
    weights = copy.deepcopy(model.state_dict())
    state = str(opt.state_dict()["state"])
    for group in opt.param_groups:
        group["lr"] = 0.0
    step(model, opt)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights.values(), model.state_dict().values(), strict=True)
    )
    assert str(opt.state_dict()["state"]) != state
    assert set(opt.last_step.changes.values()) == {0.0}


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_sparse_gradients_are_refused_when_they_arrive(base):
    table = nn.Embedding(10, 4, sparse=True)
    for memory in ("as-produced", "bfloat16", "host"):
        opt = MOLLMOptimizer(
            table.parameters(), objectives=("a", "b"), base=base, gradient_memory=memory
        )
        with pytest.raises(TypeError, match="'a' wrote a sparse gradient to parameter 0"):
            opt.backward({"a": table(torch.tensor([1])).sum(), "b": table.weight.sum()})
        assert table.weight.grad is None
