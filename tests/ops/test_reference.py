"""The reference losses against textbook formulas and 60 digits; twice differentiable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DTYPES, IGNORED, exact_row, inputs

from mollm_ops._dtypes import wide_dtype
from mollm_ops.reference.losses import (
    ce_rows_reference,
    kl_rows_reference,
    linear_ce_kl_reference,
    linear_cross_entropy_reference,
    linear_kl_div_reference,
    linear_uce_loss_reference,
    reduce_rows,
    uce_loss_reference,
)


def test_cross_entropy_is_torch_s():
    hidden, weight, target = inputs(13, 8, 50, torch.float64)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(hidden @ weight.T, target, reduction=reduction)
        got = linear_cross_entropy_reference(hidden, weight, target, reduction=reduction)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_uce_is_its_equation():
    hidden, weight, target = inputs(13, 8, 50, torch.float64, ignored=0)
    z = hidden @ weight.T
    p = z.softmax(-1).gather(-1, target[:, None])[:, 0]
    expected = -torch.log(1 - (1 - 0.01) * p)
    torch.testing.assert_close(
        uce_loss_reference(z, target, eps=0.01, reduction="none"), expected, rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        linear_uce_loss_reference(hidden, weight, target, eps=0.01), expected.mean()
    )


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 35.0])
@pytest.mark.parametrize("eps", [None, 1e-6, 1e-3, 0.5])
def test_rows_have_the_digits_of_the_exact_loss(gap, eps):
    z = torch.tensor([[gap, 0.0, -1.0, 0.5]], dtype=torch.float64)
    exact, _ = exact_row(z[0], 0, eps)
    got = float(ce_rows_reference(z, torch.tensor([0]), eps))
    assert abs(got - exact) <= 1e-14 * max(1.0, abs(exact))


def test_kl_is_its_equation_and_zero_at_the_reference():
    z, z_ref = torch.randn(2, 7, 31, dtype=torch.float64)
    p, p_ref = z.softmax(-1), z_ref.softmax(-1)
    torch.testing.assert_close(
        kl_rows_reference(z, z_ref), (p_ref * (p_ref / p).log()).sum(-1), rtol=1e-12, atol=1e-13
    )
    assert kl_rows_reference(z, z).abs().max() == 0


def test_the_reference_of_kl_is_a_constant():
    hidden, weight, _ = inputs(5, 4, 9, torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_kl_div_reference(hidden, weight, 2 * hidden.detach())
    (gradient,) = torch.autograd.grad(loss, weight)
    fixed = linear_kl_div_reference(hidden, weight, 2 * hidden.detach(), weight.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed, weight)[0])


def test_ce_kl_is_both():
    hidden, weight, target = inputs(9, 4, 11, torch.float64)
    ref_hidden = torch.randn_like(hidden)
    ce, kl = linear_ce_kl_reference(hidden, weight, target, ref_hidden)
    assert ce == linear_cross_entropy_reference(hidden, weight, target)
    assert kl == linear_kl_div_reference(hidden, weight, ref_hidden, mask=target != IGNORED)


def test_twice_differentiable():
    hidden, weight, target = inputs(4, 3, 6, torch.float64, ignored=0)
    arguments = hidden.requires_grad_(), weight.requires_grad_()
    for loss in (linear_cross_entropy_reference, linear_uce_loss_reference):
        assert torch.autograd.gradgradcheck(lambda h, w, f=loss: f(h, w, target), arguments)


def test_reductions_count_the_counted():
    losses, counted = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])
    assert reduce_rows(losses, counted, "none").tolist() == [1, 0, 3]
    assert reduce_rows(losses, counted, "sum") == 4
    assert reduce_rows(losses, counted, "mean") == 2
    assert reduce_rows(losses, counted, "mean", normalizer=8) == 0.5
    assert reduce_rows(losses, ~counted & False, "mean") == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_wide(dtype):
    logits = torch.randn(3, 5).to(dtype)
    assert uce_loss_reference(logits, torch.tensor([0, 4, 1])).dtype == wide_dtype(dtype)
