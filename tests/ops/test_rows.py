"""The row kernels of the CPU: C++ and plain Torch against float64, in place, at every edge."""

from __future__ import annotations

import mpmath
import pytest
import torch
from loss_cases import DTYPES, error, exact_row

from mollm_ops import rows as rows_module
from mollm_ops._dtypes import wide_dtype
from mollm_ops.operands import IDENTITY, LogitTransform, RowLoss
from mollm_ops.reference.losses import ce_rows_reference, kl_rows_reference
from mollm_ops.rows import _torch_rows, kl_rows, log_rows, row_targets

VOCABS = [1, 2, 15, 16, 17, 33, 1000, 2048, 4099]
LIMIT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(params=["C++", "Torch"])
def path(request, monkeypatch):
    if request.param == "Torch":
        monkeypatch.setattr(rows_module, "has_kernels_for", lambda device: False)
    return request.param


def targets(R, V):
    t = torch.randint(0, V, (R,))
    t[0], t[1], t[2] = 0, V - 1, -1
    return t


def results(logits, *, gradient=None):
    wide = wide_dtype(logits.dtype)
    return RowLoss(
        torch.full((len(logits),), torch.nan, dtype=wide),
        torch.rand(len(logits), dtype=wide) + 0.5,
        torch.full_like(logits, torch.nan) if gradient is None else gradient,
    )


def exact(logits, ref_logits, target, like, eps=None, *, kl=False):
    """What a float64 run of plain Torch gives; its own truth is `exact_row` below."""
    to = RowLoss(
        torch.empty(len(logits), dtype=torch.float64),
        like.scale.double(),
        torch.empty(logits.shape, dtype=torch.float64),
    )
    ref_logits = None if ref_logits is None else ref_logits.double()
    ce, kl = (None, to) if kl else (to, None)
    _torch_rows(logits.double(), ref_logits, target, ce, kl, eps, IDENTITY, IDENTITY)
    return to


@pytest.mark.parametrize("eps", [None, 1e-6, 0.3])
@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_rows_match_float64(dtype, V, eps, path):
    logits, t = (4 * torch.randn(7, V)).to(dtype), targets(7, V)
    to = results(logits)
    log_rows(logits, t, to, eps)
    truth = exact(logits, None, t, to, eps)
    assert error(to.losses, truth.losses) <= max(1e-13, 2e-6 * (dtype != torch.float64))
    assert error(to.gradient, truth.gradient) <= LIMIT[dtype]
    assert to.losses[2] == 0
    assert not to.gradient[2].any()


@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_rows_match_float64(dtype, V, path):
    logits, ref_logits = (3 * torch.randn(2, 7, V)).to(dtype)
    t = targets(7, V)
    ce, kl = results(logits), results(logits)
    kl_rows(logits, ref_logits, t, kl, ce)
    for to, truth in (
        (ce, exact(logits, None, t, ce)),
        (kl, exact(logits, ref_logits, t, kl, kl=True)),
    ):
        assert error(to.losses, truth.losses) <= max(1e-13, 5e-6 * (dtype != torch.float64))
        assert error(to.gradient, truth.gradient) <= LIMIT[dtype]
    alone = RowLoss(torch.empty_like(kl.losses), kl.scale, torch.empty_like(logits))
    kl_rows(logits, ref_logits, t, alone)
    assert torch.equal(alone.losses, kl.losses)
    assert torch.equal(alone.gradient, kl.gradient)


@pytest.mark.parametrize("eps", [None, 1e-6, 1e-3])
@pytest.mark.parametrize("gap", [-60.0, -9.0, 0.0, 9.0, 20.0, 45.0, 70.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sixty_digits_where_one_minus_p_is_tiny(dtype, gap, eps, path):
    """1 - p reaches 1e-30 at gap 70; every element of the gradient keeps its digits."""
    others = torch.tensor([0.0, -1.0, 0.25, -3.0], dtype=dtype)
    logits = torch.cat([others[:2], torch.tensor([gap], dtype=dtype), others[2:]])[None]
    to = results(logits)
    log_rows(logits, torch.tensor([2]), to, eps)
    loss, gradient = exact_row(logits[0], 2, eps)
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    assert abs(float(to.losses) - loss) <= limit * loss
    truth = torch.tensor(gradient, dtype=torch.float64) * to.scale.double()
    visible = truth.abs() > 1e-36
    relative = ((to.gradient[0].double() - truth) / truth)[visible].abs().max()
    assert relative <= limit * (1 if dtype == torch.float64 else 1 + abs(gap) / 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_over_the_logits(dtype, path):
    logits, ref_logits = (3 * torch.randn(2, 9, 777)).to(dtype)
    t = targets(9, 777)
    apart = results(logits), results(logits)
    kl_rows(logits, ref_logits, t, apart[1], apart[0])
    over = [
        RowLoss(torch.empty_like(a.losses), a.scale, z)
        for a, z in zip(apart, (logits, ref_logits), strict=True)
    ]
    kl_rows(logits, ref_logits, t, over[1], over[0])
    for a, b in zip(apart, over, strict=True):
        assert torch.equal(a.losses, b.losses)
        assert torch.equal(a.gradient, b.gradient)


@pytest.mark.parametrize("V", [5, 777, 5001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_in_the_first_bytes_of_wide_logits(dtype, V, path):
    logits, ref_logits = 3 * torch.randn(2, 5, V)
    t = targets(5, V)
    apart = results(logits), results(logits)
    kl_rows(logits.clone(), ref_logits.clone(), t, apart[1], apart[0])
    over = [
        RowLoss(torch.empty_like(a.losses), a.scale, z.view(dtype)[:, :V])
        for a, z in zip(apart, (logits, ref_logits), strict=True)
    ]
    kl_rows(logits, ref_logits, t, over[1], over[0])
    for a, b in zip(apart, over, strict=True):
        assert torch.equal(a.losses, b.losses)
        torch.testing.assert_close(a.gradient.to(dtype), b.gradient, rtol=0, atol=1e-7)


def test_strided_and_misaligned_rows(path):
    memory = torch.randn(6 * 40 + 3)
    logits = memory[3:].view(6, 40)[:, 1:34]
    t = targets(6, 33)
    to = results(logits, gradient=torch.empty(6, 50)[:, 7:40])
    log_rows(logits, t, to)
    truth = exact(logits, None, t, to)
    assert error(to.losses, truth.losses) <= 2e-6
    assert error(to.gradient, truth.gradient) <= 2e-6
    transposed = torch.randn(33, 6).T
    to = results(transposed, gradient=torch.empty(6, 33))
    log_rows(transposed, t, to)
    assert error(to.gradient, exact(transposed, None, t, to).gradient) <= 2e-6


def test_nothing_is_written_beside_the_rows(path):
    memory = torch.full((8, 100), 7.0)
    logits = torch.randn(8, 61)
    to = results(logits, gradient=memory[1:7, 20:81].new_empty(0))
    to = RowLoss(to.losses[:6], to.scale[:6], memory[1:7, 20:81])
    log_rows(logits[1:7], targets(6, 61), to, 1e-3)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[1:7, 20:81] = False
    assert (memory[outside] == 7).all()


@pytest.mark.parametrize("kl", [False, True])
def test_a_target_beyond_the_vocabulary_has_loss_nan_and_gradient_zero(path, kl):
    logits = torch.randn(3, 20)
    to = results(logits)
    t = torch.tensor([3, 20, 2**40])
    if kl:
        kl_rows(logits, torch.randn(3, 20), t, to)
    else:
        log_rows(logits, t, to)
    assert to.losses.isnan().tolist() == [False, True, True]
    assert not to.gradient[1:].any()
    assert to.gradient[0].any()


def test_minus_infinity_has_no_share_and_no_gradient(path):
    logits = torch.randn(1, 40)
    logits[0, 5:20] = -torch.inf
    to = results(logits)
    log_rows(logits, torch.tensor([30]), to)
    kept = torch.cat([logits[:, :5], logits[:, 20:]], 1)
    own = RowLoss(to.losses.clone(), to.scale, torch.empty_like(kept))
    log_rows(kept, torch.tensor([15]), own)
    torch.testing.assert_close(to.losses, own.losses)
    assert not to.gradient[0, 5:20].any()
    torch.testing.assert_close(to.gradient[0, 20:], own.gradient[0, 5:])


def test_no_rows(path):
    empty = torch.empty(0, 5)
    log_rows(empty, torch.empty(0, dtype=torch.int64), results(empty))
    kl_rows(empty, empty, torch.empty(0, dtype=torch.int64), results(empty))


def test_one_scale_for_all_rows(path):
    logits, t = torch.randn(5, 30), targets(5, 30)
    one = torch.tensor(0.25).expand(5)
    to = RowLoss(torch.empty(5), one, torch.empty_like(logits))
    log_rows(logits, t, to)
    same = RowLoss(torch.empty(5), one.contiguous(), torch.empty_like(logits))
    log_rows(logits, t, same)
    assert torch.equal(to.gradient, same.gradient)


def test_bitwise_equal_over_threads():
    logits, t = torch.randn(37, 3001), targets(37, 3001)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            to = RowLoss(torch.empty(37), torch.ones(37), torch.empty_like(logits))
            log_rows(logits, t, to, 1e-3)
            found.append(to)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f.gradient, found[0].gradient) for f in found)


# ---- logits that are scaled and capped

TRANSFORMS = [
    LogitTransform(0.0625),
    LogitTransform(softcap=30.0),
    LogitTransform(3.0, 4.0),
    LogitTransform(0.5, 55.0),
    LogitTransform(softcap=1e4),
]
"""Llama's exponents without a cap, the caps of models, one that saturates, one that needs the row's
maximum, one that caps nothing."""


def transformed_truth(logits, target, like, eps, transform, ref_logits=None, ref_transform=None):
    """Losses and gradients by autograd, in float64."""
    wide = logits.double().clone().requires_grad_()
    z = transform(wide)
    if ref_logits is None:
        losses = ce_rows_reference(z, target, eps)
    else:
        losses = kl_rows_reference(z, ref_transform(ref_logits.double()))
    losses = torch.where(target >= 0, losses, 0)
    (gradient,) = torch.autograd.grad(losses @ like.scale.double(), wide)
    return losses.detach(), gradient


def assert_near(to, losses, gradient, dtype):
    """Autograd's own digits end at 1e-16 of 1, those of the kernels at a share of what they say."""
    limit = 1e-13 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(to.losses.double(), losses, rtol=limit, atol=limit)
    atol = 2 * LIMIT[dtype] * float(gradient.abs().max()) + 0.25 * limit
    torch.testing.assert_close(to.gradient.double(), gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("V", [1, 17, 1000, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformed_log_rows_match_float64(dtype, V, transform, eps, path):
    logits, t = (8 / transform.scale**0.5 * torch.randn(7, V)).to(dtype), targets(7, V)
    to = results(logits)
    log_rows(logits, t, to, eps, transform)
    losses, gradient = transformed_truth(logits, t, to, eps, transform)
    assert_near(to, losses, gradient, dtype)
    assert not to.gradient[2].any()
    alone = RowLoss(torch.empty_like(to.losses), to.scale, None)
    log_rows(logits, t, alone, eps, transform)
    assert torch.equal(alone.losses, to.losses)
    log_rows(logits, t, RowLoss(alone.losses, to.scale, logits), eps, transform)
    assert torch.equal(logits, to.gradient)


@pytest.mark.parametrize("ref_transform", [None, IDENTITY, LogitTransform(2.0, 6.0)], ids=str)
@pytest.mark.parametrize("transform", [IDENTITY, *TRANSFORMS], ids=str)
@pytest.mark.parametrize("V", [1, 17, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformed_kl_rows_match_float64(dtype, V, transform, ref_transform, path):
    ref_transform = transform if ref_transform is None else ref_transform
    logits, ref_logits = (4 / transform.scale**0.5 * torch.randn(2, 7, V)).to(dtype)
    t = targets(7, V)
    ce, kl = results(logits), results(logits)
    kl_rows(logits, ref_logits, t, kl, ce, transform=transform, ref_transform=ref_transform)
    for to, reference in ((ce, (None, None)), (kl, (ref_logits, ref_transform))):
        losses, gradient = transformed_truth(logits, t, to, None, transform, *reference)
        assert_near(to, losses, gradient, dtype)
    before = kl.gradient.clone()
    kl_rows(ref_logits, ref_logits, t, kl, transform=transform, ref_transform=transform)
    assert not kl.losses.any()
    assert not kl.gradient.any()
    assert V == 1 or before.any()


@pytest.mark.parametrize("z", [1e-6, 0.01, 3.0, 30.0, 200.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_through_the_cap_has_its_digits_up_to_saturation(dtype, z, path):
    """At 500 under a cap of 30 the slope is 1.3e-14, which 1 - tanh² cannot express."""
    logits = torch.tensor([[z, -z, 0.0]], dtype=dtype)
    to = RowLoss(torch.empty(1, dtype=dtype), torch.ones(1, dtype=dtype), torch.empty_like(logits))
    log_rows(logits, torch.tensor([2]), to, None, LogitTransform(softcap=30.0))
    with mpmath.workdps(60):
        a = [mpmath.mpf(float(v)) / 30 for v in logits[0]]
        capped = [30 * mpmath.tanh(v) for v in a]
        total = mpmath.fsum(mpmath.exp(v) for v in capped)
        slopes = [1 - mpmath.tanh(v) ** 2 for v in a]
        wanted = [float(mpmath.exp(v) / total * s) for v, s in zip(capped, slopes, strict=True)]
    wanted[2] -= 1.0
    limit = 1e-12 if dtype == torch.float64 else 4e-5
    assert to.gradient[0, :2].tolist() == pytest.approx(wanted[:2], rel=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_logits_are_capped(dtype, path):
    logits = torch.tensor([[0.5, torch.inf, -torch.inf, 2.0]]).to(dtype)
    to = results(logits)
    log_rows(logits, torch.tensor([3]), to, None, LogitTransform(softcap=5.0))
    z = 5 * torch.tanh(logits.double() / 5)
    assert to.losses.item() == pytest.approx(ce_rows_reference(z, torch.tensor([3]), None).item())
    assert to.gradient[0, 1:3].abs().max() < 1e-30
    assert to.gradient[0, 0] > 0


@pytest.mark.parametrize("transform", [IDENTITY, LogitTransform(softcap=30.0)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_row_or_its_reference_is_nan_in_loss_and_gradient(dtype, whole, transform, path):
    broken = torch.randn(1, 40).to(dtype)
    broken[0, 0 if whole else 7 :] = torch.nan
    whole_row = torch.randn(1, 40).to(dtype)
    for logits, ref_logits in ((whole_row, broken), (broken, whole_row), (broken, broken)):
        kl = results(logits)
        kl_rows(
            logits, ref_logits, torch.tensor([3]), kl, transform=transform, ref_transform=transform
        )
        assert kl.losses.isnan().all()
        assert kl.gradient.isnan().all()
    for eps in (None, 1e-3):
        to = results(broken)
        log_rows(broken, torch.tensor([3]), to, eps, transform)
        assert to.losses.isnan().all()
        assert to.gradient.isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("cap", [30.0, 61.0, None])
def test_nan_of_any_bits_is_nan(bits, cap, path):
    logits = torch.randn(1, 40)
    logits.view(torch.int32)[0, 7] = bits
    to = results(logits)
    log_rows(logits, torch.tensor([3]), to, None, LogitTransform(softcap=cap))
    assert to.losses.isnan().all()


def test_a_transform_that_is_none():
    assert LogitTransform(softcap=float("inf")) == IDENTITY
    assert LogitTransform(softcap=1e31) == IDENTITY
    for scale in (1e-31, 1e31):
        with pytest.raises(ValueError, match=r"logit_scale must be in \[1e-30, 1e30\], but got 1e"):
            LogitTransform(scale)
    with pytest.raises(ValueError, match=r"logit_scale must be a positive number, but got 0"):
        LogitTransform(0)
    with pytest.raises(ValueError, match=r"softcap must be a positive number or None, but got -1"):
        LogitTransform(softcap=-1.0)


# ---- what the kernels are given

R20 = torch.ones(3), torch.ones(3), torch.ones(3, 20)
BAD = [
    (ValueError, r"target must be \[3\], but got \[2\]", {"target": torch.zeros(2).long()}),
    (TypeError, r"target must be int64, but got int32", {"target": torch.zeros(3).int()}),
    (ValueError, r"losses must be \[3\]", {"to": RowLoss(torch.ones(4), *R20[1:])}),
    (TypeError, r"losses must be float32", {"to": RowLoss(torch.ones(3).double(), *R20[1:])}),
    (ValueError, r"losses must have contiguous rows",
     {"to": RowLoss(torch.ones(6)[::2], *R20[1:])}),
    (ValueError, r"scale must be \[3\]", {"to": RowLoss(R20[0], torch.ones(()), R20[2])}),
    (ValueError, r"gradient must be \[3, 20\]", {"to": RowLoss(*R20[:2], torch.ones(3, 19))}),
    (TypeError, r"gradient must be float32 or", {"to": RowLoss(*R20[:2], R20[2].double())}),
    (ValueError, r"gradient must have contiguous rows",
     {"to": RowLoss(*R20[:2], torch.ones(20, 3).t())}),
    (ValueError, r"ref_logits must be \[3, 20\]", {"ref_logits": torch.ones(3, 21)}),
    (TypeError, r"ref_logits must be float32", {"ref_logits": torch.ones(3, 20).half()}),
    (ValueError, r"target must be on cpu", {"target": torch.zeros(3, device="meta").long()}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changed"), BAD, ids=range(len(BAD)))
def test_no_kernel_takes_memory_that_does_not_fit(kind, message, changed, path):
    given = {"target": torch.zeros(3).long(), "to": RowLoss(*R20), "ref_logits": torch.ones(3, 20)}
    given |= changed
    with pytest.raises(kind, match=message):
        kl_rows(torch.ones(3, 20), given["ref_logits"], given["target"], given["to"])


def test_gradients_of_two_dtypes_are_refused(path):
    logits, target = torch.ones(3, 20), torch.zeros(3).long()
    ce = RowLoss(*R20[:2], torch.ones(3, 20, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="gradients must have one dtype, but got bfloat16 and flo"):
        kl_rows(logits, logits, target, RowLoss(*R20), ce)


def test_row_targets():
    target = torch.tensor([0, -100, 8])
    assert row_targets(target, 9, -100).tolist() == [0, -1, 8]
    assert row_targets(torch.tensor([4, 2]), 9, 4).tolist() == [-1, 2]
    for bad in (9, -1, -101, 2**40):
        with pytest.raises(ValueError, match=rf"target must be in \[0, 9\) .*but got {bad}\."):
            row_targets(torch.tensor([0, bad]), 9, -100)
