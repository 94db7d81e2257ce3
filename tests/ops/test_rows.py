"""The row kernels of the CPU: C++ and plain Torch against float64, in place, at every edge."""

from __future__ import annotations

import pytest
import torch
from loss_cases import DTYPES, error, exact_row

from mollm_ops import rows as rows_module
from mollm_ops._dtypes import wide_dtype
from mollm_ops.operands import RowLoss
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
    _torch_rows(logits.double(), ref_logits, target, None if kl else to, to if kl else None, eps)
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


def test_row_targets():
    target = torch.tensor([0, -100, 8])
    assert row_targets(target, 9, -100).tolist() == [0, -1, 8]
    assert row_targets(torch.tensor([4, 2]), 9, 4).tolist() == [-1, 2]
    for bad in (9, -1, -101, 2**40):
        with pytest.raises(ValueError, match=rf"target must be in \[0, 9\) .*but got {bad}\."):
            row_targets(torch.tensor([0, bad]), 9, -100)
