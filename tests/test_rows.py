"""The row kernels against the equations in float64, and in 60 digits where float64 ends."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mollm_ops.reference import ce_rows_reference, kl_rows_reference, wide_dtype
from mollm_ops.rows import RowLoss, _torch_rows, kl_rows, log_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
UNIT = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def row_loss(rows, vocab, dtype, scale=None, gradient=None):
    wide = wide_dtype(dtype)
    scale = torch.ones(rows, dtype=wide) if scale is None else scale.to(wide)
    gradient = torch.full((rows, vocab), torch.nan, dtype=dtype) if gradient is None else gradient
    return RowLoss(torch.full((rows,), torch.nan, dtype=wide), scale, gradient)


def exact(losses, z, scale):
    return torch.autograd.grad((losses * scale).sum(), z)[0]


def assert_close(got, want, dtype, atol=None):
    unit = UNIT[dtype]
    smallest = 6e-8 if dtype == torch.float16 else 1e-37 if dtype != torch.float64 else 1e-300
    torch.testing.assert_close(
        got.double(), want, rtol=4 * unit, atol=max(smallest, atol or 0), equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [None, 1e-3, 1e-6, 0.9])
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 1000, 2048, 2049, 5003])
def test_log_rows_match_float64(dtype, eps, vocab):
    torch.manual_seed(vocab)
    z = (3 * torch.randn(7, vocab)).to(dtype)
    target = torch.randint(vocab, (7,))
    target[0], target[1] = 0, vocab - 1
    scale = torch.rand(7, dtype=torch.float64)
    to = row_loss(7, vocab, dtype, scale)
    log_rows(z, target, to, eps)
    wide = z.double().requires_grad_()
    losses = ce_rows_reference(wide, target, eps)
    assert_close(to.losses, losses.detach(), wide_dtype(dtype), atol=1e-12)
    assert_close(to.gradient, exact(losses, wide, scale), dtype, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 2049, 5003])
def test_kl_rows_match_float64_in_both_gradients(dtype, vocab):
    torch.manual_seed(vocab)
    z, z_ref = ((2 * torch.randn(6, vocab)).to(dtype) for _ in range(2))
    target = torch.randint(vocab, (6,))
    scale = torch.rand(6, dtype=torch.float64)
    ce, kl = (row_loss(6, vocab, dtype, scale) for _ in range(2))
    kl_rows(z, z_ref, target, kl, ce)
    alone = row_loss(6, vocab, dtype, scale)
    kl_rows(z, z_ref, target, alone)
    wide = z.double().requires_grad_()
    losses = kl_rows_reference(wide, z_ref.double())
    assert_close(kl.losses, losses.detach(), wide_dtype(dtype), atol=1e-7)
    assert_close(kl.gradient, exact(losses, wide, scale), dtype, atol=1e-8)
    assert torch.equal(alone.losses, kl.losses)
    assert torch.equal(alone.gradient, kl.gradient)
    losses = ce_rows_reference(wide, target, None)
    assert_close(ce.losses, losses.detach(), wide_dtype(dtype), atol=1e-12)
    assert_close(ce.gradient, exact(losses, wide, scale), dtype, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_place_equal_those_in_new_memory(dtype):
    torch.manual_seed(0)
    z, z_ref = (torch.randn(5, 333).to(dtype) for _ in range(2))
    target = torch.tensor([0, 332, -1, 7, 400])
    ce, kl = (row_loss(5, 333, dtype) for _ in range(2))
    kl_rows(z, z_ref, target, kl, ce)
    a, b = z.clone(), z_ref.clone()
    kl_rows(a, b, target, row_loss(5, 333, dtype, gradient=b), row_loss(5, 333, dtype, gradient=a))
    assert torch.equal(a, ce.gradient)
    assert torch.equal(b, kl.gradient)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_may_overwrite_its_own_wide_logits(narrow):
    torch.manual_seed(0)
    z, z_ref = torch.randn(4, 1037), torch.randn(4, 1037)
    target = torch.tensor([0, 1036, -1, 5])
    wide = row_loss(4, 1037, torch.float32)
    kl_rows(z, z_ref, target, wide)
    gradient = z.view(narrow)[:, :1037]
    kl_rows(z, z_ref, target, RowLoss(torch.empty(4), torch.ones(4), gradient))
    assert torch.equal(gradient, wide.gradient.to(narrow))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_target_are_zero_and_unknown_targets_are_nan(dtype):
    z = torch.full((3, 40), torch.nan, dtype=dtype)
    z[2] = 0
    target = torch.tensor([-1, 40, 39])
    to = row_loss(3, 40, dtype)
    log_rows(z, target, to, 1e-3)
    assert to.losses[0] == 0
    assert to.losses[1].isnan()
    assert to.losses[2] > 0
    assert torch.equal(to.gradient[:2], torch.zeros(2, 40, dtype=dtype))
    ce, kl = (row_loss(3, 40, dtype) for _ in range(2))
    kl_rows(z, z, target, kl, ce)
    assert kl.losses[0] == 0
    assert kl.losses[2] == 0
    assert torch.equal(kl.gradient, torch.zeros(3, 40, dtype=dtype))


def test_a_nan_logit_makes_a_nan_loss():
    z = torch.zeros(1, 50)
    z[0, 49] = torch.nan
    to = row_loss(1, 50, torch.float32)
    log_rows(z, torch.tensor([0]), to, 1e-3)
    assert to.losses.isnan().all()
    assert to.gradient.isnan().any()


def test_masked_out_logits_are_tokens_of_probability_zero():
    z, z_ref = torch.randn(2, 30), torch.randn(2, 30)
    z[:, 10:] = z_ref[:, 10:] = -torch.inf
    target = torch.tensor([0, 9])
    kl, small = row_loss(2, 30, torch.float32), row_loss(2, 10, torch.float32)
    kl_rows(z, z_ref, target, kl)
    kl_rows(z[:, :10].contiguous(), z_ref[:, :10].contiguous(), target, small)
    torch.testing.assert_close(kl.losses, small.losses)
    torch.testing.assert_close(kl.gradient[:, :10], small.gradient)
    assert (kl.gradient[:, 10:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log10_rest", [-3, -6, -8, -12, -20, -30])
@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
def test_uce_is_exact_where_one_minus_p_has_no_digits(dtype, log10_rest, eps):
    """V - 1 equal logits whose exponentials add up to 10^log10_rest of the target's."""
    V = 1001
    z = torch.full((1, V), log10_rest * 2.302585092994046 - 6.907755278982137, dtype=dtype)
    z[0, 500] = 0
    to = row_loss(1, V, dtype)
    log_rows(z, torch.tensor([500]), to, eps)
    with mpmath.workdps(60):
        e = mpmath.exp(mpmath.mpf(z[0, 0].item()))
        S, eps_ = (V - 1) * e, mpmath.mpf(eps)
        Z = S + 1
        s = (1 - eps_) / (S + eps_)
        want = [mpmath.log(1 + s), s * S / Z, -s * e / Z]
    got = [to.losses[0].item(), to.gradient[0, 500].item(), to.gradient[0, 0].item()]
    unit = 3e-6 if dtype == torch.float32 else 1e-13
    for g, w in zip(got, want, strict=True):
        assert abs(g / w - 1) < unit


logit_rows = st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=40)


@given(logits=logit_rows, at=st.integers(0, 1000), log_eps=st.floats(-13.8, -0.01))
@settings(deadline=None, max_examples=150)
def test_uce_and_its_gradient_are_bounded(logits, at, log_eps):
    eps = float(torch.tensor(log_eps).exp())
    z = torch.tensor([logits])
    t = at % len(logits)
    to = row_loss(1, len(logits), torch.float32)
    log_rows(z, torch.tensor([t]), to, eps)
    p = torch.softmax(z.double(), 1)[0, t].item()
    slack = 1 + 2e-6
    assert 0 <= to.losses.item() <= -log_eps * slack
    assert abs(to.gradient[0, t].item()) <= (1 - eps) * p * slack + 1e-37
    assert to.gradient.double().abs().sum().item() <= 2 * slack
    assert abs(to.gradient.double().sum().item()) <= 1e-5


@given(logits=logit_rows, noise=st.floats(0, 1e-2))
@settings(deadline=None, max_examples=150)
def test_kl_is_never_negative(logits, noise):
    z_ref = torch.tensor([logits])
    z = z_ref + noise * torch.linspace(-1, 1, len(logits))
    to = row_loss(1, len(logits), torch.float32)
    kl_rows(z, z_ref, torch.tensor([0]), to)
    assert to.losses.item() >= 0


def test_kl_of_a_model_with_itself_is_zero_with_gradient_zero():
    z = 5 * torch.randn(3, 4099)
    to = row_loss(3, 4099, torch.float32)
    kl_rows(z, z, torch.zeros(3, dtype=torch.int64), to)
    assert (to.losses == 0).all()
    assert (to.gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_plain_torch_rows_agree_with_the_kernels(dtype, eps):
    torch.manual_seed(0)
    z, z_ref = (4 * torch.randn(6, 501)).to(dtype), (4 * torch.randn(6, 501)).to(dtype)
    target = torch.tensor([0, 500, -1, 501, 3, 3])
    scale = torch.rand(6)
    ours, plain = ([row_loss(6, 501, dtype, scale) for _ in range(2)] for _ in range(2))
    log_rows(z, target, ours[0], eps)
    _torch_rows(z, None, target, plain[0], None, eps)
    kl_rows(z, z_ref, target, ours[1])
    _torch_rows(z, z_ref, target, None, plain[1], None)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.losses, b.losses, equal_nan=True, rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-5, atol=1e-7)
