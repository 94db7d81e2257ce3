"""Gradients of a head's weight that are left for later: some rows at a time, the same numbers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from loss_cases import DTYPES, IGNORED, error, inputs, leaves

from mollm_ops import linear_ce_kl, linear_cross_entropy, linear_kl_div, linear_uce_loss
from mollm_ops.deferred import deferring

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
WIDTHS = (7, 32, 301)


def ce(hidden, weight, target, ref_hidden, **options):
    return [linear_cross_entropy(hidden, weight, target, **options)]


def uce(hidden, weight, target, ref_hidden, **options):
    return [linear_uce_loss(hidden, weight, target, **options)]


def kl(hidden, weight, target, ref_hidden, **options):
    return [linear_kl_div(hidden, weight, ref_hidden, mask=target != IGNORED, **options)]


def both(hidden, weight, target, ref_hidden, **options):
    return list(linear_ce_kl(hidden, weight, target, ref_hidden, **options))


LOSSES = [ce, uce, kl, both]
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"normalizer": 3.0, "chunk_rows": 4},
    {"logit_scale": 1.5, "softcap": 3.0},
    {"softcap": 50.0, "reduction": "none"},
]


def case(dtype, rows=23, width=16, vocab=301, **options):
    torch.manual_seed(0)
    hidden, weight, target = inputs(rows, width, vocab, dtype, scale=2.0, **options)
    return hidden, weight, target, (hidden.double() + torch.randn_like(hidden) / 4).to(dtype)


def upstreams(losses):
    """One for each loss, which tells tokens apart where they are not reduced."""
    ramps = (torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64) for loss in losses)
    return [
        ramp.reshape(loss.shape).to(loss.dtype) for ramp, loss in zip(ramps, losses, strict=True)
    ]


def at_once(loss, hidden, weight, target, ref_hidden, **options):
    """The gradients of every loss for itself: of hidden and of weight."""
    hidden, weight = leaves(hidden, weight)
    losses = loss(hidden, weight, target, ref_hidden, **options)
    return losses, [
        torch.autograd.grad(each, [hidden, weight], u, retain_graph=True)
        for each, u in zip(losses, upstreams(losses), strict=True)
    ]


def later(loss, hidden, weight, target, ref_hidden, width=32, **options):
    """The same, dW some rows at a time."""
    hidden, weight = leaves(hidden, weight)
    found = []
    with deferring({weight}, found):
        losses = loss(hidden, weight, target, ref_hidden, **options)
    (call,) = found
    gradients, arrived = [], []
    for each, u in zip(losses, upstreams(losses), strict=True):
        dh, *probed = torch.autograd.grad(
            each, [hidden, *call.probes], u, retain_graph=True, allow_unused=True
        )
        gradients.append([dh])
        arrived.append(probed)
    parts = [
        call.rows(arrived, begin, min(begin + width, len(weight)))
        for begin in range(0, len(weight), width)
    ]
    for k, mine in enumerate(gradients):
        mine.append(torch.cat([part[k] for part in parts]))
    return losses, gradients


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_are_as_exact_as_the_gradient_made_at_once(loss, dtype, options):
    hidden, weight, target, ref_hidden = case(dtype)
    wide = [t.double() for t in (hidden, weight)]
    _, exact = at_once(loss, *wide, target, ref_hidden.double(), **options)
    losses, plain = at_once(loss, hidden, weight, target, ref_hidden, **options)
    same, ours = later(loss, hidden, weight, target, ref_hidden, **options)
    assert all(torch.equal(a, b) for a, b in zip(losses, same, strict=True))
    for truth, a, b in zip(exact, plain, ours, strict=True):
        assert torch.equal(a[0], b[0])
        assert b[1].dtype == dtype
        assert error(b[1], truth[1]) <= error(a[1], truth[1]) + TOLERANCE[dtype]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_slices_of_any_size_are_the_same(loss, width):
    tensors = case(torch.float64)
    _, plain = at_once(loss, *tensors)
    _, ours = later(loss, *tensors, width=width)
    torch.testing.assert_close([list(a) for a in plain], ours, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_rows_that_do_not_count(loss, rows):
    hidden, weight, target, ref_hidden = (
        case(torch.float64, rows=rows)
        if rows
        else (
            torch.zeros(0, 16, dtype=torch.float64),
            case(torch.float64)[1],
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, 16, dtype=torch.float64),
        )
    )
    target = torch.full_like(target, IGNORED)
    _, ours = later(loss, hidden, weight, target, ref_hidden)
    assert all(float(g.abs().sum()) == 0 for each in ours for g in each)


def test_many_tokens_are_worked_on_a_few_at_a_time():
    tensors = case(torch.float64, rows=150)
    _, plain = at_once(both, *tensors)
    from mollm_ops import deferred

    before, deferred.WORKSPACE_BYTES["cpu"] = deferred.WORKSPACE_BYTES["cpu"], 1
    try:
        _, ours = later(both, *tensors)
    finally:
        deferred.WORKSPACE_BYTES["cpu"] = before
    torch.testing.assert_close([list(a) for a in plain], ours, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_kl_is_zero_at_the_reference(dtype):
    hidden, weight, target, _ = case(dtype)
    _, ours = later(kl, hidden, weight, target, hidden)
    assert float(ours[0][1].abs().sum()) == 0


def test_a_token_that_is_known_keeps_its_digits():
    """Where 1 - p has no digit, S / Z has all of them."""
    hidden, weight = 30 * torch.eye(4), torch.eye(9, 4)
    target = torch.tensor([0, 1, 2, 3])
    _, exact = at_once(uce, hidden.double(), weight.double(), target, None)
    _, ours = later(uce, hidden, weight, target, None, width=5)
    assert error(ours[0][1], exact[0][1]) < 1e-5


def test_a_bias_and_a_reference_of_its_own():
    hidden, weight, target, ref_hidden = case(torch.float64)
    bias, ref_bias = torch.randn(2, len(weight), dtype=torch.float64)
    options = {"bias": bias, "ref_bias": ref_bias, "ref_weight": weight.flip(0), "ref_softcap": 4.0}
    _, plain = at_once(both, hidden, weight, target, ref_hidden, **options)
    _, ours = later(both, hidden, weight, target, ref_hidden, **options)
    torch.testing.assert_close([list(a) for a in plain], ours, rtol=1e-12, atol=1e-14)


def test_an_objective_may_read_both_losses_of_a_call_and_another_none():
    hidden, weight, target, ref_hidden = case(torch.float64)
    (_, (of_ce, of_kl)) = at_once(both, hidden, weight, target, ref_hidden)
    own, head = leaves(hidden, weight)
    found = []
    with deferring([head], found):
        ce_loss, kl_loss = both(own, head, target, ref_hidden)
    call = found[0]
    arrived = [torch.autograd.grad(2 * ce_loss + 3 * kl_loss, call.probes), [None, None]]
    rows, nothing = call.rows(arrived, 10, 20)
    scale = float(upstreams([ce_loss])[0])
    expected = (2 * of_ce[1][10:20] + 3 * of_kl[1][10:20]) / scale
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    assert nothing is None


@pytest.mark.parametrize("name", ["hidden", "ref_hidden"])
def test_hidden_states_that_change_before_the_rows_are_made_are_refused(name):
    hidden, weight, target, ref_hidden = case(torch.float64, ignored=False)
    own, head = leaves(hidden, weight)
    found = []
    with deferring({head}, found):
        (loss,) = kl(own, head, target, ref_hidden)
    arrived = [torch.autograd.grad(loss, found[0].probes)]
    before = found[0].rows(arrived, 0, 10)
    target.zero_()
    torch.testing.assert_close(found[0].rows(arrived, 0, 10), before, rtol=0, atol=0)
    with torch.no_grad():
        (own if name == "hidden" else ref_hidden).add_(1)
    with pytest.raises(RuntimeError, match=f"^{name} was changed in place.* change a copy of it"):
        found[0].rows(arrived, 0, 10)


def test_hidden_states_of_inference_mode():
    hidden, weight, target, _ = case(torch.float64)
    with torch.inference_mode():
        ref_hidden = hidden * 2
    _, plain = at_once(kl, hidden, weight, target, hidden * 2)
    _, ours = later(kl, hidden, weight, target, ref_hidden)
    torch.testing.assert_close([list(a) for a in plain], ours, rtol=1e-12, atol=1e-14)


def test_biases_that_change_before_the_rows_are_made():
    hidden, weight, target, ref_hidden = case(torch.float64)
    biases = dict(zip(("bias", "ref_bias"), torch.randn(2, len(weight)).double(), strict=True))
    own, head = leaves(hidden, weight)
    found = []
    with deferring({head}, found):
        (loss,) = kl(own, head, target, ref_hidden, **biases)
    arrived = [torch.autograd.grad(loss, found[0].probes)]
    before = found[0].rows(arrived, 0, 10)
    for bias in biases.values():
        bias.add_(1).mul_(2)
    torch.testing.assert_close(found[0].rows(arrived, 0, 10), before, rtol=0, atol=0)


def test_a_reference_that_reads_another_such_weight_is_not_put_off():
    hidden, weight, _, ref_hidden = case(torch.float64)
    own, head, other = leaves(hidden, weight, weight.flip(0))
    found = []
    with deferring([head, other], found):
        linear_kl_div(own, head, ref_hidden, ref_weight=other).backward()
        assert found == []
        assert head.grad is not None
        linear_kl_div(own, head, ref_hidden, ref_weight=head.detach())
    assert len(found) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast_rows_are_cast_and_no_weight_is_kept(loss):
    hidden, weight, target, ref_hidden = case(torch.float32)
    own, head = leaves(hidden, weight)
    found = []
    with deferring({head}, found), torch.autocast("cpu", torch.bfloat16):
        losses = [loss(own, head, target, ref_hidden) for _ in range(3)]
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == weight.shape]
    assert not any(t.dtype == torch.bfloat16 for t in alive)
    cast = [t.bfloat16() for t in (hidden, weight)]
    _, expected = later(loss, *cast, target, ref_hidden.bfloat16())
    arrived = [
        torch.autograd.grad(each, found[0].probes, u, allow_unused=True)
        for each, u in zip(losses[0], upstreams(losses[0]), strict=True)
    ]
    ours = found[0].rows(arrived, 0, len(weight))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b[1].float(), rtol=0, atol=0)


def test_a_call_is_gone_with_the_last_who_holds_it():
    hidden, weight, target, _ = case(torch.float64)
    own, head = leaves(hidden, weight)
    found = []
    with deferring({head}, found):
        linear_cross_entropy(own, head, target)
    call = weakref.ref(found[0])
    gc.disable()
    try:
        del found
        assert call() is None
    finally:
        gc.enable()


def test_other_weights_have_their_gradients_at_once():
    hidden, weight, target, _ = case(torch.float64)
    own, head, other = leaves(hidden, weight, weight)
    found = []
    with deferring({head}, found):
        linear_cross_entropy(own, other, target).backward()
        with torch.no_grad():
            linear_cross_entropy(own, head, target)
        linear_cross_entropy(own.detach(), head, target).backward()
    assert found == []
    assert other.grad is not None
    assert head.grad is not None  # nothing below it would notice what backward hands down
