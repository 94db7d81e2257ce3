"""What methods do besides their forget loss, against formulas written out in float64."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from answer_cases import answers, per_sequence

from mollm import MOLLMOptimizer
from mollm.data.chat import ChatFormat, Example, collate
from mollm.errors import UsageError
from mollm.methods import METHODS, Seen, answers_of, find_method
from mollm.methods.dual_optim import in_turns
from mollm.methods.on_logits import summed
from mollm.methods.pdu import dual_step
from mollm.methods.rmu import activation_loss, train_some_matrices
from mollm.methods.sago import sign_gate
from mollm.methods.task_arithmetic import negated
from mollm.optim.dual_optim import DualOptimPlus


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", METHODS)
def test_published_values_are_taken_where_nothing_is_chosen(name):
    method = find_method(name)
    assert method.settings({}) == method.hyperparameters
    assert method.bound(method.forget_loss, method.settings({})) is method.forget_loss


PUBLISHED = {
    "dpo": {"beta": 0.1},
    "undial": {"beta": 10.0},
    "wga": {"beta": 1.0},
    "satimp": {"beta1": 5.0, "beta2": 1.0},
    "ceu": {"ignore_first": True},
    "pdu": {"retain_loss_eps": 0.3, "dual_step_size": 5.0, "warmup_epochs": 5.0},
    "task-arithmetic": {"scale": 1.0},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "delta": 0.0},
    "mollm": {"eps": 1e-4},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    assert find_method(name).hyperparameters == PUBLISHED[name]


def test_rmu_has_the_values_of_its_paper():
    found = find_method("rmu").hyperparameters
    assert found["layer"] == 7
    assert found["steering_coeff"] == 6.5


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("npo", {"betta": 1}, r"must be of beta, but got 'betta'; did you mean beta\?"),
        ("npo", {"beta": 0}, "beta of npo must be positive, but got 0"),
        ("npo", {"beta": "much"}, "beta of npo must be a number from 0, but got 'much'"),
        ("npo", {"beta": True}, "beta of npo must be a number from 0, but got True"),
        ("npo", {"beta": float("nan")}, "must be a number from 0, but got nan"),
        ("altpo", {"samples": 1.5}, "samples of altpo must be a whole number from 0, but got 1.5"),
        ("ceu", {"ignore_first": 1}, "ignore_first of ceu must be true or false, but got 1"),
        ("ga", {"beta": 1}, "method_options of ga must be left out: it has none, but got 'beta'"),
        ("sago", {"loss": 3}, "loss of sago must be a text, but got 3"),
        (
            "sago",
            {"loss": "npoo"},
            r"one of graddiff, npo, simnpo, but got 'npoo'; did you mean npo",
        ),
        ("dualoptim-plus", {"loss": "npoo"}, "loss must be one of graddiff, npo, simnpo, but got"),
        (
            "dualoptim-plus",
            {"betas": [0.9]},
            "betas must be two numbers from 0 to below 1, but got",
        ),
        ("dualoptim-plus", {"base_betas": ["a", 0.9]}, "base_betas must be two numbers from 0 to"),
        (
            "rmu",
            {"update_layers": 1.5},
            "must be the number of a block from 0, or a list .* got 1.5",
        ),
        ("rmu", {"update_layers": []}, "must be the number of a block from 0, or a list of such"),
        ("rmu", {"update_layers": [True]}, "must be the number of a block from 0, or a list of"),
        ("rmu", {"update_layers": [-1]}, "must be the number of a block from 0, or a list of such"),
        ("rmu", {"update_parameters": "("}, "must be a regular expression, but got '\\('"),
    ],
)
def test_a_hyperparameter_that_is_none_or_out_of_range_is_refused(name, chosen, message):
    with pytest.raises(UsageError, match=message):
        find_method(name).settings(chosen)


def test_simnpo_within_another_method_has_the_weight_that_it_has_alone():
    model, reference = answers(1), answers(2)
    alone = find_method("simnpo")
    expected = alone.preferences[0] * alone.forget_loss(model, lambda: reference)
    for name in ("sago", "dualoptim-plus"):
        method = find_method(name)
        loss = method.bound(method.forget_loss, method.settings({"loss": "simnpo"}))
        torch.testing.assert_close(loss(model, lambda: reference), expected, rtol=0, atol=0)


def test_a_chosen_hyperparameter_reaches_the_loss():
    method = find_method("undial")
    model, reference = answers(1), answers(2)
    losses = [
        method.bound(method.forget_loss, method.settings({"beta": beta}))(model, lambda: reference)
        for beta in (10.0, 1e-9)
    ]
    p = (reference.hidden @ reference.weight.T + reference.bias).softmax(1)
    mine = (model.hidden @ model.weight.T + model.bias).log_softmax(1)
    torch.testing.assert_close(losses[1], -(p * mine).sum() / 8, rtol=1e-7, atol=0)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["undial", "ceu", "pdu"])
def test_a_loss_on_logits_is_the_same_in_chunks_and_trains_the_head(name, monkeypatch):
    model = answers(1)
    leaves = (model.hidden, model.weight.requires_grad_(), model.bias.requires_grad_())
    reference = answers(2)
    loss = find_method(name).forget_loss
    whole = loss(model, lambda: reference)
    grads = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr("mollm.methods.on_logits._CHUNK", 22)
    parts = loss(model, lambda: reference)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(parts, leaves), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_gradients_of_a_loss_on_logits_are_right():
    model = answers(1)
    leaves = (model.hidden, model.weight.requires_grad_(), model.bias.requires_grad_())

    def total(hidden, weight, bias):
        from dataclasses import replace

        some = replace(model, hidden=hidden, weight=weight, bias=bias)
        return summed(some, lambda z, target, places: z.logsumexp(1) ** 2)

    assert torch.autograd.gradcheck(total, leaves)
    with torch.no_grad():
        assert total(*leaves) > 0


def test_the_retain_loss_of_rmu_is_that_of_the_formula():
    model, original = answers(1), answers(2)
    squares = torch.stack(
        [((h - o) ** 2).mean() for h, o in zip(model.states, original.states, strict=True)]
    )
    loss = activation_loss(model, original)
    torch.testing.assert_close(loss, per_sequence(model, squares), rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_inner_states_are_those_of_the_block_at_the_answers(side):
    model, chat = tiny.model(), ChatFormat(tiny.tokenizer())
    rows = [chat.encode(Example(*pair)) for pair in (("Who?", "Ada"), ("And when?", "In 1843."))]
    found = answers_of(model, collate(rows, chat.pad_id, side), layer=0).states
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        expected += [states[n] for n, label in enumerate(row.labels[1:]) if label != -100]
    torch.testing.assert_close(found, torch.stack(expected), rtol=2e-2, atol=2e-3)


def test_rmu_trains_one_matrix_of_three_blocks():
    model = tiny.model(num_hidden_layers=4)
    train_some_matrices(model, layer=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1, 2)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layer must be from 0 to 1 for this model, but got 7"),
        ({"layer": 0, "update_layers": [1]}, "must be blocks from 0 to layer 0, .* but got "),
        ({"layer": 1, "update_parameters": "c_proj"}, "must match a parameter of block 0, but got"),
    ],
)
def test_rmu_refuses_blocks_and_matrices_that_there_are_not(options, message):
    with pytest.raises(UsageError, match=message):
        train_some_matrices(tiny.model(), **options)


def test_the_multiplier_of_pdu_follows_the_retain_loss():
    now = {"forget": 1.0, "kl": 0.0, "retain_a": 10.0, "retain_b": 1.0}
    losses = {"forget": 9.0, "kl": 9.0, "retain_a": 0.5, "retain_b": 0.05}
    early = Seen(losses, epoch=4.9, applied=3)
    assert dual_step(now, now, early) == now
    after = dual_step(now, now, Seen(losses, epoch=5.0, applied=4))
    assert after == pytest.approx({"forget": 1, "kl": 0, "retain_a": 11, "retain_b": 0})
    broken = losses | {"retain_a": float("nan")}
    assert dual_step(now, now, Seen(broken, epoch=9, applied=4))["retain_a"] == 10


def test_task_arithmetic_turns_the_change_around():
    before, trained = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert negated(trained, before, scale=2.0).tolist() == [0.0, 4.0]


def test_sago_keeps_what_does_not_oppose_the_retain_gradient():
    f = torch.tensor([1.0, -2.0, 3.0, 0.0, 1e-40], dtype=torch.float64)
    r = torch.tensor([2.0, 5.0, 0.0, 7.0, -1e-300], dtype=torch.float64)
    gated = sign_gate({"forget": f, "kl": f, "retain": r})
    assert gated["forget"].tolist() == [1, 0, 3, 0, 0]
    assert gated["retain"].tolist() == [0, 5, 0, 0, -1e-300]
    assert gated["kl"] is f


def test_sago_with_several_sets_goes_by_their_sums():
    one = torch.tensor([1.0])
    gated = sign_gate({"forget": one, "retain_a": -3 * one, "retain_b": one})
    assert [float(g) for g in gated.values()] == [0, -3, 1]


@pytest.mark.parametrize("memory", ["as-produced", "bfloat16"])
def test_an_optimizer_steps_along_changed_gradients(memory):
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = MOLLMOptimizer(
        [x],
        lr=1.0,
        objectives=("forget", "kl", "retain"),
        base="sgd",
        direction="sum",
        preferences=(1, 0, 1),
        gradient_memory=memory,
    )
    optimizer.backward(
        {
            "forget": (x * torch.tensor([1.0, 1.0, 1.0])).sum(),
            "kl": x.sum(),
            "retain": (x * torch.tensor([-2.0, 4.0, 0.0])).sum(),
        }
    )
    optimizer.change_gradients(sign_gate)
    optimizer.step()
    assert x.tolist() == [2.0, -1.0, -1.0]


def test_preferences_can_change_between_steps():
    x = torch.nn.Parameter(torch.zeros(2))
    optimizer = MOLLMOptimizer(
        [x], lr=1.0, objectives=("a", "b"), base="sgd", direction="sum", preferences=(1, 0)
    )
    for preferences in ((1, 0), (0, 3)):
        optimizer.set_preferences(preferences)
        optimizer.backward({"a": x[0], "b": x[1]})
        optimizer.step()
    assert x.tolist() == [-1.0, -3.0]


def test_turns_of_dual_optim():
    first = {"forget": 1.0, "kl": 0.0, "retain": 2.0}
    found = [
        in_turns(first, first, None if n == 0 else Seen({}, 0.0, n), retain_steps=2)
        for n in range(4)
    ]
    forget, retain = {"forget": 1, "kl": 0, "retain": 0}, {"forget": 0, "kl": 0, "retain": 2}
    assert found == [forget, retain, retain, forget]


def test_dual_optim_steps_as_its_equations_say():
    torch.manual_seed(0)
    start = torch.randn(7, dtype=torch.float64)
    gradients = torch.randn(9, 7, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = DualOptimPlus(
        [p],
        lr=0.1,
        forget_steps=1,
        retain_steps=2,
        forget_lr_ratio=0.5,
        betas=(0.8, 0.9),
        base_betas=(0.7, 0.6),
        weight_decay=0.2,
    )
    x, m, v = start.clone(), torch.zeros(7).double(), torch.zeros(7).double()
    dm = {0: torch.zeros(7).double(), 1: torch.zeros(7).double()}
    dv, counts = copy.deepcopy(dm), {0: 0, 1: 0}
    for t, g in enumerate(gradients, start=1):
        k = 0 if (t - 1) % 3 < 1 else 1
        counts[k] += 1
        hat_m = m / (1 - 0.7 ** (t - 1)) if t > 1 else 0 * m
        hat_v = v / (1 - 0.6 ** (t - 1)) if t > 1 else 0 * v
        dm[k] = 0.8 * dm[k] + 0.2 * (g - hat_m)
        dv[k] = 0.9 * dv[k] + 0.1 * (g**2 - hat_v)
        lr = 0.05 if k == 0 else 0.1
        mean = dm[k] / (1 - 0.8 ** counts[k]) + hat_m
        square = (dv[k] / (1 - 0.9 ** counts[k]) + hat_v).abs()
        x = (1 - lr * 0.2) * x - lr * mean / (square.sqrt() + 1e-8)
        m, v = 0.7 * m + 0.3 * g, 0.6 * v + 0.4 * g**2
        p.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(p.data, x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"retain_steps": 0}, "must be at least 1, but got 1 and 0"),
    ],
)
def test_dual_optim_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DualOptimPlus([torch.nn.Parameter(torch.zeros(1))], **options)
