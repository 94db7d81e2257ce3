"""Run by test_rows_triton.py under TRITON_INTERPRET=1: the Triton kernels on ragged shapes."""

import itertools

import pytest
import torch

from mollm_ops._rows_triton import kl_rows_triton, log_rows_triton
from mollm_ops.operands import IDENTITY, LogitTransform, RowLoss
from mollm_ops.reference.losses import ce_rows_reference, kl_rows_reference
from mollm_ops.rows import row_targets

UNIT = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Around a block of 128 and of 8192 logits, which 16384 + 5 exceeds twice.
VOCABS = [1, 127, 128, 129, 8192, 16389]
NARROW = [(dtype, vocab) for dtype in (torch.bfloat16, torch.float16) for vocab in (129, 16389)]
"""A dtype matters where rows are read and written, whatever is computed between."""
CAPPED = LogitTransform(2.0, 7.0)
TRANSFORMS = [IDENTITY, LogitTransform(0.0625), CAPPED]
ONE = torch.ones(1)
LOG = [
    *itertools.product([torch.float32], VOCABS, [None, 1e-3], TRANSFORMS),
    *((*shape, 1e-3, CAPPED) for shape in NARROW),
]
KL = [
    *itertools.product([torch.float32], VOCABS, [IDENTITY, CAPPED], [IDENTITY, CAPPED]),
    *((*shape, CAPPED, IDENTITY) for shape in NARROW),
]


def row_loss(z, scale, gradient=True):
    rows = len(z)
    return RowLoss(
        torch.full((rows,), torch.nan), scale, torch.full_like(z, torch.nan) if gradient else None
    )


def logits(dtype, vocab, rows=3, pad=3):
    """Rows that begin at any alignment."""
    return (3 * torch.randn(rows, vocab + pad)).to(dtype)[:, pad:]


def check(to, losses, gradient, dtype):
    torch.testing.assert_close(to.losses.double(), losses, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(to.gradient.double(), gradient, rtol=2 * UNIT[dtype], atol=2e-7)


@pytest.mark.parametrize(("dtype", "vocab", "eps", "transform"), LOG, ids=str)
def test_log_rows(dtype, vocab, eps, transform):
    torch.manual_seed(vocab)
    z = logits(dtype, vocab)
    target = torch.tensor([0, vocab - 1, vocab // 2])
    scale = torch.rand(3)
    to = row_loss(z, scale)
    log_rows_triton(z, target, to, eps, transform)
    wide = z.double().requires_grad_()
    losses = ce_rows_reference(transform(wide), target, eps)
    check(to, losses.detach(), torch.autograd.grad(losses @ scale.double(), wide)[0], dtype)
    alone = row_loss(z, scale, gradient=False)
    log_rows_triton(z, target, alone, eps, transform)
    assert torch.equal(alone.losses, to.losses)
    in_place = RowLoss(alone.losses, scale, z)
    log_rows_triton(z, target, in_place, eps, transform)
    assert torch.equal(z, to.gradient)


@pytest.mark.parametrize(("dtype", "vocab", "transform", "ref_transform"), KL, ids=str)
def test_kl_rows_and_both_gradients(dtype, vocab, transform, ref_transform):
    torch.manual_seed(vocab)
    z, z_ref = logits(dtype, vocab), logits(dtype, vocab, pad=1)
    target = torch.tensor([0, vocab - 1, vocab // 2])
    scale = torch.rand(())
    kl, ce, alone = (row_loss(z, scale.expand(3)) for _ in range(3))
    kl_rows_triton(z, z_ref, target, kl, ce, transform, ref_transform)
    kl_rows_triton(z, z_ref, target, alone, None, transform, ref_transform)
    assert torch.equal(alone.gradient, kl.gradient)
    wide = z.double().requires_grad_()
    for to, losses in (
        (kl, kl_rows_reference(transform(wide), ref_transform(z_ref.double()))),
        (ce, ce_rows_reference(transform(wide), target, None)),
    ):
        want = torch.autograd.grad(losses.sum() * scale.double(), wide)[0]
        check(to, losses.detach(), want, dtype)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_gradients_lie_over_their_own_wide_logits(narrow):
    z, z_ref = torch.randn(4, 9001), torch.randn(4, 9001)
    target = torch.tensor([0, 9000, -1, 5])
    kl, ce = (row_loss(z, torch.ones(4)) for _ in range(2))
    kl_rows_triton(z, z_ref, target, kl, ce, IDENTITY, IDENTITY)
    over = [RowLoss(torch.empty(4), torch.ones(4), x.view(narrow)[:, :9001]) for x in (z, z_ref)]
    kl_rows_triton(z, z_ref, target, over[1], over[0], IDENTITY, IDENTITY)
    for got, want in ((over[0], ce), (over[1], kl)):
        # The interpreter truncates to bfloat16 where the hardware rounds.
        torch.testing.assert_close(got.gradient.float(), want.gradient, rtol=8e-3, atol=1e-7)


@pytest.mark.parametrize("log10_rest", [-3, -8, -20, -30])
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_uce_is_exact_where_one_minus_p_has_no_digits(log10_rest, eps):
    z = torch.full((1, 1001), log10_rest * 2.302585092994046 - 6.907755278982137)
    z[0, 500] = 0
    to = row_loss(z, torch.ones(1))
    log_rows_triton(z, torch.tensor([500]), to, eps, IDENTITY)
    e = z[0, 0].double().exp().item()
    S = 1000 * e
    s = (1 - eps) / (S + eps)
    assert to.gradient[0, 500].item() == pytest.approx(s * S / (S + 1), rel=2e-5)
    assert to.gradient[0, 0].item() == pytest.approx(-s * e / (S + 1), rel=2e-5)


def test_rows_without_a_target_are_zero_and_unknown_targets_are_nan():
    z = torch.full((3, 40), torch.nan)
    z[2] = 0
    target = row_targets(torch.tensor([-100, 39, 39]), 40, -100)
    target[1] = 40
    to, kl, ce = (row_loss(z, torch.ones(3)) for _ in range(3))
    log_rows_triton(z, target, to, 1e-3, IDENTITY)
    kl_rows_triton(z, z, target, kl, ce, IDENTITY, IDENTITY)
    for one in (to, kl, ce):
        assert one.losses[0] == 0
        assert one.losses[1].isnan()
        assert (one.gradient[:2] == 0).all()
    assert to.losses[2] > 0
    assert kl.losses[2] == 0
    assert (kl.gradient == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_kl_is_zero_at_the_reference_and_never_negative(transform):
    z, target = 5 * torch.randn(3, 9001), torch.zeros(3, dtype=torch.int64)
    to = row_loss(z, torch.ones(3))
    kl_rows_triton(z, z, target, to, None, transform, transform)
    assert (to.losses == 0).all()
    assert (to.gradient == 0).all()
    near = z + 1e-3 * torch.randn_like(z)
    kl_rows_triton(z, near, target, to, None, transform, transform)
    assert (to.losses > 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("begin", [0, 7])
def test_nan_in_the_reference_is_nan_in_loss_and_gradient(transform, begin):
    z, z_ref, to = torch.randn(1, 200), torch.randn(1, 200), row_loss(torch.ones(1, 200), ONE)
    z_ref[0, begin:] = torch.nan
    kl_rows_triton(z, z_ref, torch.tensor([3]), to, None, transform, transform)
    assert to.losses.isnan().all()
    assert to.gradient.isnan().all()


@pytest.mark.parametrize("z", [1e-6, 0.01, 3.0, 30.0, 200.0])
def test_the_gradient_through_the_cap_has_its_digits_up_to_saturation(z):
    row, to = torch.tensor([[z, -z, 0.0]]), row_loss(torch.ones(1, 3), ONE)
    log_rows_triton(row, torch.tensor([2]), to, None, LogitTransform(softcap=30.0))
    wide = row.double() / 30
    p = (30 * wide.tanh()).softmax(1)
    wanted = p * wide.cosh().reciprocal().square()
    torch.testing.assert_close(to.gradient[:, :2].double(), wanted[:, :2], rtol=4e-5, atol=0)


def test_uce_has_its_digits_where_eps_is_next_to_one():
    to = row_loss(torch.ones(1, 300), ONE)
    log_rows_triton(torch.zeros(1, 300), torch.tensor([5]), to, 1 - 1e-7, IDENTITY)
    assert to.losses.item() == pytest.approx(1e-7 / 300, rel=1e-5)


def test_very_unlikely_targets_have_finite_losses():
    z = torch.zeros(1, 300)
    z[0, 7] = 200
    to = row_loss(z, torch.ones(1))
    log_rows_triton(z, torch.tensor([0]), to, None, IDENTITY)
    assert to.losses.item() == pytest.approx(200)
    log_rows_triton(z, torch.tensor([0]), to, 1e-3, IDENTITY)
    assert to.losses.item() == 0
