"""uce_loss: exact to float64 everywhere, bounded, and a good citizen of Torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, IGNORED, error, exact_row, exact_uce, leaves, loss_and_gradients
from torch.library import opcheck

from mollm_ops import uce_loss
from mollm_ops.reference.losses import uce_loss_reference

SHAPES = [((1,), 1), ((3,), 2), ((5,), 17), ((2, 3), 101), ((4, 1, 2), 2049)]
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def case(lead, V, dtype=torch.float32, scale=4.0):
    target = torch.randint(0, V, lead)
    target.view(-1)[-1] = V - 1
    target.view(-1)[0] = 0
    if target.numel() > 2:
        target.view(-1)[1] = IGNORED
    return (scale * torch.randn(*lead, V)).to(dtype), target


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize(("lead", "V"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_plain_torch_of_the_same_dtype(dtype, lead, V, eps):
    logits, target = case(lead, V, dtype)
    truth = exact_uce(logits, target, eps)
    ours = loss_and_gradients(lambda z: uce_loss(z, target, eps=eps), [logits])
    plain = loss_and_gradients(lambda z: uce_loss_reference(z, target, eps=eps), [logits])
    assert ours[1].dtype == dtype
    if V == 1:  # p = 1: the gradient is exactly zero, also where plain Torch rounds
        assert not ours[1].any()
    else:
        assert error(ours[1], truth[1]) <= error(plain[1], truth[1]) + ROUNDING[dtype] / 2
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert error(ours[0], truth[0]) <= error(plain[0], truth[0]) + tolerance


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("gap", [0.0, 13.0, 40.0, 70.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_digits_at_the_target_down_to_one_minus_p_of_1e_30(dtype, gap, eps):
    logits = torch.zeros(1, 6, dtype=dtype)
    logits[0, 4] = gap
    loss, gradient = loss_and_gradients(lambda z: uce_loss(z, torch.tensor([4]), eps=eps), [logits])
    exact_loss, exact_gradient = exact_row(logits[0], 4, eps)
    limit = 1e-13 if dtype == torch.float64 else 5e-6
    assert float(loss) == pytest.approx(exact_loss, rel=limit)
    assert gradient[0].tolist() == pytest.approx(exact_gradient, rel=limit)


def test_the_naive_form_fails_where_this_one_does_not():
    """Why rows.py never computes 1 - p: at 1 - p = 5e-9 float32 has no digit of it."""
    logits = torch.zeros(1, 6)
    logits[0, 4] = 21.0
    _, exact = exact_row(logits[0], 4, 1e-3)
    z = logits.clone().requires_grad_()
    p = z.softmax(-1)[0, 4]
    (naive,) = torch.autograd.grad(-torch.log(1 - (1 - 1e-3) * p), z)
    _, ours = loss_and_gradients(lambda z: uce_loss(z, torch.tensor([4]), eps=1e-3), [logits])
    assert abs(float(naive[0, 4]) / exact[4] - 1) > 0.1
    assert abs(float(ours[0, 4]) / exact[4] - 1) < 1e-5


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40),
    eps=st.floats(1e-6, 1 - 1e-6),
    at=st.integers(0, 39),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_bounds_for_every_logit_and_eps(logits, eps, at, dtype):
    at %= len(logits)
    z = torch.tensor([logits], dtype=dtype)
    loss, gradient = loss_and_gradients(lambda z: uce_loss(z, torch.tensor([at]), eps=eps), [z])
    slack = 1 + 1e-5
    assert 0 <= loss <= -math.log(eps) * slack
    p = float(z.double().softmax(-1)[0, at])
    assert abs(gradient[0, at]) <= (1 - eps) * p * slack + 1e-30
    assert float(gradient.abs().sum()) <= 2 * slack
    assert abs(float(gradient.sum())) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(shift=st.integers(-60, 60), seed=st.integers(0, 2**31))
def test_invariant_to_a_shift_of_all_logits(shift, seed):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 40, (4, 33), generator=gen) / 8.0  # the shift is exact
    target = torch.randint(0, 33, (4,), generator=gen)
    a = loss_and_gradients(lambda z: uce_loss(z, target), [logits])
    b = loss_and_gradients(lambda z: uce_loss(z, target), [logits + shift])
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction):
    logits, target = case((6,), 7, torch.float64)
    f = lambda z: uce_loss(z, target, eps=0.05, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_and_capped_logits(dtype):
    logits, target = case((2, 5), 301, dtype)
    options = {"logit_scale": 1.5, "softcap": 6.0}
    truth = loss_and_gradients(lambda z: uce_loss_reference(z, target, **options),
                               [logits.double()])  # fmt: skip
    ours = loss_and_gradients(lambda z: uce_loss(z, target, **options), [logits])
    plain = loss_and_gradients(lambda z: uce_loss_reference(z, target, **options), [logits])
    assert error(ours[1], truth[1]) <= error(plain[1], truth[1]) + ROUNDING[dtype]
    assert error(ours[0], truth[0]) <= error(plain[0], truth[0]) + 1e-6


def test_none_takes_every_upstream_gradient():
    logits, target = case((2, 5), 31, torch.float64)
    upstream = torch.randn(2, 5, dtype=torch.float64)
    ours, truth = (
        loss_and_gradients(lambda z, f=f: f(z, target, reduction="none"), [logits], upstream)
        for f in (uce_loss, uce_loss_reference)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_padding_changes_nothing():
    logits, target = case((3, 4), 20)
    padded = torch.cat([torch.randn(3, 5, 20), logits, torch.randn(3, 2, 20)], 1)
    ids = torch.full((3, 11), IGNORED)
    ids[:, 5:9] = target
    a = loss_and_gradients(lambda z: uce_loss(z, target), [logits])
    b = loss_and_gradients(lambda z: uce_loss(z, ids), [padded])
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(a[1], b[1][:, 5:9], rtol=1e-6, atol=1e-9)
    assert not b[1][:, :5].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_and_no_rows(reduction):
    for logits in (torch.randn(3, 8), torch.randn(0, 8)):
        logits.requires_grad_()
        target = torch.full((len(logits),), IGNORED)
        loss = uce_loss(logits, target, reduction=reduction)
        assert not loss.any()
        loss.sum().backward()
        assert not logits.grad.any()


def test_another_ignore_index():
    logits, _ = case((3,), 9)
    target = torch.tensor([0, 2, 0])
    kept = uce_loss(logits[1:2], target[1:2])
    torch.testing.assert_close(uce_loss(logits, target, ignore_index=0), kept)


def test_non_contiguous_misaligned_and_narrow_targets():
    memory = torch.randn(1 + 6 * 33)
    target = torch.randint(0, 33, (6,))
    for logits in (memory[1:].view(6, 33), torch.randn(33, 6).T, torch.randn(6, 66)[:, ::2],
                   torch.randn(33).expand(6, 33)):  # fmt: skip
        got = loss_and_gradients(lambda z: uce_loss(z, target.int()), [logits])
        plain = loss_and_gradients(lambda z: uce_loss(z, target), [logits.contiguous()])
        assert torch.equal(got[0], plain[0])
        assert torch.equal(got[1], plain[1])
    strided = torch.randn(6, 66)[:, ::2].requires_grad_()
    assert torch.equal(uce_loss(strided, target), uce_loss(strided.contiguous(), target))


def test_the_logits_stay_as_they_are():
    logits, target = case((4,), 30)
    before = logits.clone()
    loss_and_gradients(lambda z: uce_loss(z, target), [logits])
    assert torch.equal(logits, before)


def test_retain_graph():
    logits, target = case((4,), 30)
    logits.requires_grad_()
    loss = uce_loss(logits, target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(3 * loss, logits)[0]
    torch.testing.assert_close(second, 3 * first)


def test_opcheck():
    logits, target = case((5,), 12)
    options = (1e-3, IGNORED, 0.5, 4.0)
    opcheck(torch.ops.mollm.uce_rows.default, (logits.requires_grad_(), target, *options))
    opcheck(
        torch.ops.mollm.uce_rows_backward.default,
        (logits.detach(), target, torch.randn(5), *options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_break_for_any_number_of_rows(dtype):
    compiled = torch.compile(uce_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9, 14):
        logits, target = case((rows,), 12, dtype)
        a = loss_and_gradients(lambda z, t=target: compiled(z, t), [logits])
        b = loss_and_gradients(lambda z, t=target: uce_loss(z, t), [logits])
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def test_double_backward_is_refused():
    logits, target = case((3,), 5)
    loss = uce_loss(logits.requires_grad_(), target)
    with pytest.raises(RuntimeError, match=r"create_graph must be False.*mollm_ops\.reference"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_transforms_are_refused_not_zero():
    logits, target = case((3,), 5)
    f = lambda z: uce_loss(z, target)  # noqa: E731
    for transform in (
        lambda: torch.func.grad(f)(logits),
        lambda: torch.func.jvp(f, (logits,), (logits,)),
        lambda: torch.func.vmap(torch.func.grad(lambda z: uce_loss(z, target[:1])))(
            logits[:, None]
        ),
    ):
        with pytest.raises(RuntimeError, match=r"must be differentiated with backward\(\)"):
            transform()


ERRORS = [
    (ValueError, r"eps must be between 0 and 1", {"eps": 0.0}),
    (ValueError, r"eps must be between 0 and 1", {"eps": 1.0}),
    (ValueError, r"eps must be at least 1\.2e-38", {"eps": 1e-39}),
    (ValueError, r"softcap must be a positive number", {"softcap": 0.0}),
    (ValueError, r'reduction must be "mean"', {"reduction": "avg"}),
    (ValueError, r"target must be \(3,\) like the rows", {"target": torch.zeros(2).long()}),
    (TypeError, r"target must hold integers, but got float32", {"target": torch.zeros(3)}),
    (ValueError, r"target must be in \[0, 5\)", {"target": torch.tensor([0, 1, 5])}),
    (ValueError, r"target must be in \[0, 5\)", {"target": torch.tensor([0, -1, 4])}),
    (TypeError, r"logits must be one of .*, but got int64", {"logits": torch.ones(3, 5).long()}),
    (ValueError, r"logits must be \[\.\.\., V\]", {"logits": torch.ones(())}),
    (ValueError, r"logits must be \[\.\.\., V\]", {"logits": torch.ones(3, 0)}),
    (ValueError, r"target must be on cpu", {"target": torch.zeros(3, device="meta").long()}),
]


@pytest.mark.parametrize(("kind", "message", "changed"), ERRORS, ids=range(len(ERRORS)))
def test_bad_arguments(kind, message, changed):
    arguments = {"logits": torch.randn(3, 5), "target": torch.zeros(3).long()} | changed
    with pytest.raises(kind, match=message):
        uce_loss(**arguments)
