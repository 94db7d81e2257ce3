"""The four linear losses: exact, frugal, invariant to batching, and good citizens of Torch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, IGNORED, Recorded, error, inputs, leaves, loss_and_gradients
from torch.library import opcheck

from mollm_ops import _chunks, linear_ce_kl, linear_cross_entropy, linear_kl_div, linear_uce_loss
from mollm_ops._dtypes import wide_dtype
from mollm_ops.operands import IDENTITY, LogitTransform
from mollm_ops.reference.losses import (
    ce_rows_reference,
    kl_rows_reference,
    linear_ce_kl_reference,
    linear_cross_entropy_reference,
    linear_kl_div_reference,
    linear_uce_loss_reference,
    reduce_rows,
)

SHAPES = [(1, 3, 2), (5, 7, 19), (23, 16, 301), (12, 33, 2050)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def ce(hidden, weight, target, ref_hidden, ref_weight=None, **options):
    return linear_cross_entropy(hidden, weight, target, **options)


def uce(hidden, weight, target, ref_hidden, ref_weight=None, **options):
    return linear_uce_loss(hidden, weight, target, **options)


def kl(hidden, weight, target, ref_hidden, **options):
    return linear_kl_div(hidden, weight, ref_hidden, mask=target != IGNORED, **options)


def ce_of_both(hidden, weight, target, ref_hidden, **options):
    return linear_ce_kl(hidden, weight, target, ref_hidden, **options)[0]


def kl_of_both(hidden, weight, target, ref_hidden, **options):
    return linear_ce_kl(hidden, weight, target, ref_hidden, **options)[1]


LOSSES = [ce, uce, kl, ce_of_both, kl_of_both]
LOG_LOSSES = [linear_cross_entropy, linear_uce_loss]


def reference(loss):
    """The definition of a loss of LOSSES, called as that one."""

    def f(hidden, weight, target, ref_hidden, **options):
        if loss in (ce, ce_of_both):
            return linear_cross_entropy_reference(hidden, weight, target, **options)
        if loss is uce:
            return linear_uce_loss_reference(hidden, weight, target, **options)
        return linear_kl_div_reference(
            hidden, weight, ref_hidden, mask=target != IGNORED, **options
        )

    return f


def plain(loss, hidden, weight, target, ref_hidden, transform=IDENTITY):
    """What one writes in Torch: a linear layer of the same dtype, then the loss in float32."""
    counted, at = target != IGNORED, target.clamp(min=0)
    z = transform(F.linear(hidden, weight).to(wide_dtype(hidden.dtype)))
    if loss in (kl, kl_of_both):
        with torch.no_grad():
            z_ref = transform(F.linear(ref_hidden, weight).to(z.dtype))
        return reduce_rows(kl_rows_reference(z, z_ref), counted, "mean")
    return reduce_rows(ce_rows_reference(z, at, 1e-3 if loss is uce else None), counted, "mean")


def case(rows=11, width=6, vocab=37, dtype=torch.float32, **options):
    hidden, weight, target = inputs(rows, width, vocab, dtype, **options)
    ref_hidden = hidden + (torch.randn_like(hidden, dtype=torch.float32) / 4).to(dtype)
    return hidden, weight, target, ref_hidden


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize(("rows", "width", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_as_exact_as_plain_torch_of_the_same_dtype(loss, dtype, rows, width, vocab, chunk_rows):
    hidden, weight, target, ref_hidden = case(rows, width, vocab, dtype, scale=2.0)
    ours = loss_and_gradients(
        lambda h, w: loss(h, w, target, ref_hidden, chunk_rows=chunk_rows), [hidden, weight]
    )
    assert ours[0].dtype == wide_dtype(dtype)
    assert_as_exact_as_plain(ours, loss, hidden, weight, target, ref_hidden)


def assert_as_exact_as_plain(ours, loss, hidden, weight, target, ref_hidden):
    truth = loss_and_gradients(
        lambda h, w: reference(loss)(h, w, target, ref_hidden.double()),
        [hidden.double(), weight.double()],
    )
    theirs = loss_and_gradients(
        lambda h, w: plain(loss, h, w, target, ref_hidden), [hidden, weight]
    )
    for name, a, b, exact in zip(["L", "dh", "dW"], ours, theirs, truth, strict=True):
        assert error(a, exact) <= error(b, exact) + TOLERANCE[hidden.dtype], name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(loss, reduction):
    hidden, weight, target, ref_hidden = case(5, 3, 7, torch.float64)
    options = {"eps": 0.05} if loss is uce else {}
    if loss not in (ce, uce):  # a constant, also while gradcheck moves weight
        options["ref_weight"] = weight.clone()
    bias = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: loss(
            h, w, target, ref_hidden, bias=b, reduction=reduction, chunk_rows=2, **options
        ),
        leaves(hidden, weight, bias),
        fast_mode=True,
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 9),
    vocab=st.integers(1, 70),
    eps=st.floats(1e-6, 1 - 1e-6),
    scale=st.floats(0, 60),
    seed=st.integers(0, 2**31),
)
def test_uce_is_bounded(rows, width, vocab, eps, scale, seed):
    torch.manual_seed(seed)
    hidden, weight, target = inputs(rows, width, vocab, scale=scale, ignored=0.2)
    bias = torch.zeros(vocab)
    loss, d_bias = loss_and_gradients(
        lambda b: linear_uce_loss(hidden, weight, target, bias=b, eps=eps, reduction="none"),
        [bias],
        torch.ones(rows),
    )
    assert (loss >= 0).all()
    assert (loss <= -math.log(eps) * (1 + 1e-5)).all()
    assert float(d_bias.abs().sum()) <= 2 * rows * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    distance=st.floats(0, 30),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_kl_is_never_negative(distance, seed, dtype):
    torch.manual_seed(seed)
    hidden, weight, _ = inputs(6, 8, 90, dtype, scale=3.0)
    ref_hidden = hidden + (distance * torch.randn(6, 8)).to(dtype)
    assert (linear_kl_div(hidden, weight, ref_hidden, reduction="none") >= 0).all()
    assert linear_kl_div(hidden, weight, hidden) == 0


def test_the_gradient_of_kl_is_zero_at_the_reference():
    hidden, weight, _, _ = case(dtype=torch.bfloat16)
    gradients = loss_and_gradients(lambda h, w: linear_kl_div(h, w, hidden, weight),
                                   [hidden, weight])  # fmt: skip
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("loss", [kl, kl_of_both])
def test_the_gradient_of_kl_keeps_its_digits_in_bfloat16(loss):
    """Two models close to each other: logits rounded to bfloat16 are 4-23% off here."""
    hidden, weight, target = inputs(64, 64, 2000, torch.bfloat16, scale=3.0)
    ref_hidden = (hidden.float() * (1 + 0.02 * torch.randn(64, 64))).bfloat16()
    truth = loss_and_gradients(
        lambda h, w: reference(loss)(h, w, target, ref_hidden.double()),
        [hidden.double(), weight.double()],
    )
    ours = loss_and_gradients(lambda h, w: loss(h, w, target, ref_hidden), [hidden, weight])
    rounded = loss_and_gradients(
        lambda h, w: plain(loss, h, w, target, ref_hidden), [hidden, weight]
    )
    assert float((ours[0].double() / truth[0] - 1).abs()) <= 1e-4
    for a, b, exact in zip(ours[1:], rounded[1:], truth[1:], strict=True):
        assert float((a.double() - exact).norm() / exact.norm()) <= 0.01
        assert float((b.double() - exact).norm() / exact.norm()) > 0.02


def test_dw_of_many_rows_in_bfloat16_is_no_worse_than_one_gemm_s():
    rows, width, vocab = 16384, 8, 48
    hidden, weight, target = inputs(rows, width, vocab, torch.bfloat16, ignored=0)
    truth = loss_and_gradients(
        lambda w: linear_cross_entropy_reference(hidden.double(), w, target, reduction="sum"),
        [weight.double()],
    )[1]
    ours = [
        loss_and_gradients(
            lambda w, n=n: linear_cross_entropy(hidden, w, target, reduction="sum", chunk_rows=n),
            [weight],
        )[1]
        for n in (None, 512, 4096)
    ]
    z = F.linear(hidden, weight).float()
    d_z = (z.softmax(1) - F.one_hot(target, vocab)).bfloat16()
    single = d_z.t() @ hidden
    limit = float((single.double() - truth).norm() / truth.norm())
    for gradient in ours:
        assert float((gradient.double() - truth).norm() / truth.norm()) <= 1.02 * limit


@pytest.mark.parametrize("loss", LOSSES)
def test_none_takes_every_upstream_gradient(loss):
    hidden, weight, target, ref_hidden = case(dtype=torch.float64)
    upstream = torch.randn(len(hidden), dtype=torch.float64)
    ours, truth = (
        loss_and_gradients(
            lambda h, w, b, f=f: f(h, w, target, ref_hidden, bias=b, reduction="none"),
            [hidden, weight, torch.ones(len(weight), dtype=torch.float64)],
            upstream,
        )
        for f in (loss, reference(loss))
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not ours[1][target == IGNORED].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing(loss):
    hidden, weight, target, ref_hidden = case(6)
    pad = torch.randn(3, hidden.shape[1])
    for left, right in ((3, 0), (0, 3), (3, 3)):
        pads = [pad[:left], pad[:right]]
        ids = [torch.full((len(p),), IGNORED) for p in pads]
        padded = torch.cat([pads[0], hidden, pads[1]])
        a = loss_and_gradients(lambda h, w: loss(h, w, target, ref_hidden), [hidden, weight])
        b = loss_and_gradients(
            lambda h, w, pads=pads, ids=ids: loss(
                h,
                w,
                torch.cat([ids[0], target, ids[1]]),
                torch.cat([pads[0], ref_hidden, pads[1]]),
            ),
            [padded, weight],
        )
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
        assert torch.equal(a[1], b[1][left : left + 6])
        assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tensor", [True, False])
def test_splits_of_a_batch_add_up_with_a_normalizer(loss, tensor):
    hidden, weight, target, ref_hidden = case(12, dtype=torch.float64)
    count = int((target != IGNORED).sum())
    normalizer = torch.tensor([count]) if tensor else count
    whole = loss_and_gradients(lambda h, w: loss(h, w, target, ref_hidden), [hidden, weight])
    own = leaves(hidden, weight)
    total = 0.0
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        part_loss = loss(
            own[0][part], own[1], target[part], ref_hidden[part], normalizer=normalizer
        )
        part_loss.backward()
        total += float(part_loss.detach())
    assert total == pytest.approx(float(whole[0]), rel=1e-12)
    torch.testing.assert_close(own[0].grad, whole[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(own[1].grad, whole[2], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_nothing(loss):
    hidden, weight, target, ref_hidden = case(12, dtype=torch.float64)
    found = [
        loss_and_gradients(
            lambda h, w, n=n: loss(h, w, target, ref_hidden, chunk_rows=n), [hidden, weight]
        )
        for n in (1, 5, 12, 400)
    ]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_all_rows_ignored_and_no_rows(loss, dtype, reduction):
    for rows in (4, 0):
        hidden, weight, _, ref_hidden = (
            t[:rows] if k != 1 else t for k, t in enumerate(case(5, dtype=dtype))
        )
        bias = torch.randn(len(weight)).to(dtype)
        own = leaves(hidden, weight, bias)
        out = loss(
            *own[:2],
            torch.full((rows,), IGNORED),
            ref_hidden,
            bias=own[2],
            reduction=reduction,
        )
        assert not out.any()
        out.sum().backward()
        assert all(t.grad is not None and not t.grad.any() for t in own)


def test_an_empty_micro_batch_with_normalizer_zero():
    hidden, weight, _, _ = case(4)
    hidden.requires_grad_()
    loss = linear_uce_loss(hidden, weight, torch.full((4,), IGNORED), normalizer=torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_leading_shape_and_bias(loss):
    hidden, weight, target, ref_hidden = case(12, dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64)
    flat = loss_and_gradients(
        lambda h, w, b: loss(h, w, target, ref_hidden, bias=b), [hidden, weight, bias]
    )
    shaped = loss_and_gradients(
        lambda h, w, b: loss(h, w, target.view(3, 4), ref_hidden.view(3, 4, -1), bias=b),
        [hidden.view(3, 4, -1), weight, bias],
    )
    exact = loss_and_gradients(
        lambda h, w, b: reference(loss)(h, w, target, ref_hidden, bias=b), [hidden, weight, bias]
    )
    for a, b, c in zip(flat, shaped, exact, strict=True):
        torch.testing.assert_close(a.reshape(-1), b.reshape(-1), rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-13)


def test_a_bias_of_the_reference():
    hidden, weight, target, ref_hidden = case(dtype=torch.float64)
    ref_weight, ref_bias = torch.randn(37, 9).double(), torch.randn(37).double()
    ref_hidden = torch.randn(11, 9).double()
    mask = target != IGNORED
    got = linear_kl_div(hidden, weight, ref_hidden, ref_weight, mask=mask, ref_bias=ref_bias)
    exact = linear_kl_div_reference(
        hidden, weight, ref_hidden, ref_weight, mask=mask, ref_bias=ref_bias
    )
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)
    both = linear_ce_kl(hidden, weight, target, ref_hidden, ref_weight, ref_bias=ref_bias)
    truth = linear_ce_kl_reference(hidden, weight, target, ref_hidden, ref_weight,
                                   ref_bias=ref_bias)  # fmt: skip
    torch.testing.assert_close(both, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_tied_embeddings(loss):
    _, weight, target, ref_hidden = case(dtype=torch.float64)
    ids = torch.randint(0, len(weight), (len(target),))
    ours, exact = (
        loss_and_gradients(
            lambda w, f=f: f(F.embedding(ids, w).tanh(), w, target, ref_hidden), [weight]
        )
        for f in (loss, reference(loss))
    )
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_non_contiguous_and_misaligned_inputs(loss):
    hidden, weight, target, ref_hidden = case()
    memory = torch.randn(1 + hidden.numel())
    for h, w in (
        (memory[1:].view_as(hidden), weight.t().contiguous().t()),
        (torch.randn(6, 11).t(), torch.randn(37, 12)[:, ::2]),
        (torch.randn(6).expand(11, 6), torch.randn(6).expand(37, 6)),
    ):
        a = loss_and_gradients(lambda h, w: loss(h, w, target, ref_hidden), [h, w])
        b = loss_and_gradients(
            lambda h, w: loss(h, w, target, ref_hidden), [h.contiguous(), w.contiguous()]
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        own = h.detach().requires_grad_()
        torch.testing.assert_close(loss(own, w, target, ref_hidden), a[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [-50.0, 3.0, 700.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_invariant_to_a_shift_of_all_logits(loss, shift):
    hidden, weight, target, ref_hidden = case(5, dtype=torch.float64)
    bias = torch.full((len(weight),), shift, dtype=torch.float64)
    a = loss_and_gradients(lambda h: loss(h, weight, target, ref_hidden), [hidden])
    b = loss_and_gradients(lambda h: loss(h, weight, target, ref_hidden, bias=bias), [hidden])
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_retain_graph(loss, reduction):
    hidden, weight, target, ref_hidden = case(dtype=torch.float64)
    own = leaves(hidden, weight)
    out = loss(*own, target, ref_hidden, reduction=reduction).sum()
    first = [g.clone() for g in torch.autograd.grad(3 * out, own, retain_graph=True)]
    second = [g.clone() for g in torch.autograd.grad(out, own, retain_graph=True)]
    third = torch.autograd.grad(0.5 * out, own)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, 3 * b)
        torch.testing.assert_close(c, 0.5 * b)


@pytest.mark.parametrize("order", ["ce kl", "kl ce", "together", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_two_losses_of_ce_kl_are_differentiated_apart_or_together(order, reduction):
    hidden, weight, target, ref_hidden = case(dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64)
    separate = [
        loss_and_gradients(
            lambda h, w, b, f=f: f(h, w, target, ref_hidden, bias=b, reduction=reduction).sum(),
            [hidden, weight, bias],
        )
        for f in (ce, kl)
    ]
    own = leaves(hidden, weight, bias)
    losses = linear_ce_kl(*own[:2], target, ref_hidden, bias=own[2], reduction=reduction)
    losses = [x.sum() for x in losses]
    factors = (0.25, 4.0) if order == "weighted" else (1.0, 1.0)
    if order in ("together", "weighted"):
        (factors[0] * losses[0] + factors[1] * losses[1]).backward()
    else:
        for x in losses if order == "ce kl" else losses[::-1]:
            x.backward()
    for k, tensor in enumerate(own):
        expected = sum(c * s[1 + k] for c, s in zip(factors, separate, strict=True))
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(losses, [s[0] for s in separate], rtol=1e-12, atol=1e-13)


# ---- logits that are scaled and capped

TRANSFORMS = [
    {"logit_scale": 0.0625},
    {"softcap": 5.0},
    {"logit_scale": 1.5, "softcap": 3.0},
    {"softcap": 50.0},
]


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_transformed_logits_are_as_exact_as_plain_torch_s(loss, dtype, options, chunk_rows):
    hidden, weight, target, ref_hidden = case(12, 33, 301, dtype, scale=2.0)
    transform = LogitTransform(options.get("logit_scale", 1.0), options.get("softcap"))
    ours = loss_and_gradients(
        lambda h, w: loss(h, w, target, ref_hidden, chunk_rows=chunk_rows, **options),
        [hidden, weight],
    )
    truth = loss_and_gradients(
        lambda h, w: reference(loss)(h, w, target, ref_hidden.double(), **options),
        [hidden.double(), weight.double()],
    )
    theirs = loss_and_gradients(
        lambda h, w: plain(loss, h, w, target, ref_hidden, transform),
        [hidden, weight],
    )
    for name, a, b, exact in zip(["L", "dh", "dW"], ours, theirs, truth, strict=True):
        assert error(a, exact) <= error(b, exact) + TOLERANCE[hidden.dtype], name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_transformed_logits(loss, reduction):
    hidden, weight, target, ref_hidden = case(5, 3, 7, torch.float64)
    options = {"eps": 0.05} if loss is uce else {}
    if loss not in (ce, uce):
        options |= {"ref_weight": weight.clone(), "ref_softcap": math.inf, "ref_logit_scale": 2.0}
    bias = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: loss(
            h, w, target, ref_hidden, bias=b, logit_scale=1.5, softcap=2.0, reduction=reduction,
            chunk_rows=2, **options,
        ),
        leaves(hidden, weight, bias),
        fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("loss", [kl, kl_of_both])
def test_the_reference_has_the_models_transform_unless_it_has_its_own(loss):
    hidden, weight, target, ref_hidden = case(dtype=torch.float64)
    own = {"logit_scale": 1.5, "softcap": 3.0}
    same = loss(hidden, weight, target, ref_hidden, **own)
    named = loss(hidden, weight, target, ref_hidden, **own, ref_logit_scale=1.5, ref_softcap=3.0)
    assert same == named
    assert loss(hidden, weight, target, hidden, **own) == 0
    plain_one = loss(
        hidden, weight, target, ref_hidden, **own, ref_logit_scale=1.0, ref_softcap=math.inf
    )
    z = LogitTransform(1.5, 3.0)(hidden @ weight.T)
    rows = kl_rows_reference(z, ref_hidden @ weight.T)
    torch.testing.assert_close(plain_one, reduce_rows(rows, target != IGNORED, "mean"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_transformed_logits_compile_without_a_break(loss, reduction):
    torch.compiler.reset()
    hidden, weight, target, ref_hidden = case()
    own = leaves(hidden, weight)
    f = partial(loss, reduction=reduction, logit_scale=0.5, softcap=4.0)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for g in (compiled, f):
        g(*own, target, ref_hidden).sum().backward()
    a = loss_and_gradients(lambda h, w: compiled(h, w, target, ref_hidden).sum(), own)
    b = loss_and_gradients(lambda h, w: f(h, w, target, ref_hidden).sum(), own)
    torch.testing.assert_close(a, b)


# ---- small gradients


def test_small_gradients_of_float16_keep_their_digits():
    """Of a mean over tokens most are below 6e-8, the smallest number of float16."""
    hidden, weight, target = inputs(256, 32, 4000, torch.float16, scale=0.3, ignored=0)
    ref_hidden = (hidden.float() + 0.3 * torch.randn(256, 32)).half()
    for loss in LOSSES:
        truth = loss_and_gradients(
            lambda h, w, f=loss: reference(f)(h, w, target, ref_hidden.double()),
            [hidden.double(), weight.double()],
        )
        for scale in (1.0, 65536.0):
            for none in (False, True):
                ours = loss_and_gradients(
                    lambda h, w, f=loss, s=scale, n=none: (
                        s * f(h, w, target, ref_hidden).mean()
                        if not n
                        else s * f(h, w, target, ref_hidden, reduction="none").mean()
                    ),
                    [hidden, weight],
                )
                for a, exact in zip(ours[1:], truth[1:], strict=True):
                    exact = scale * exact
                    off = float((a.double() - exact).norm() / exact.norm())
                    best = float((exact.half().double() - exact).norm() / exact.norm())
                    assert off <= 1.01 * best + 2e-3, (loss.__name__, scale, none)


def test_a_zero_upstream_gradient_of_float16_is_zero():
    hidden, weight, target, _ = case(dtype=torch.float16)
    own = leaves(hidden, weight)
    (0 * linear_cross_entropy(*own, target, reduction="none")).sum().backward()
    assert not own[0].grad.any()
    assert not own[1].grad.any()


@pytest.mark.parametrize("which", [0, 1])
def test_both_losses_without_reduction_are_as_exact_as_reduced(which):
    hidden, weight, target, ref_hidden = case(40, 64, 500, torch.bfloat16, scale=2.0)
    found = [
        loss_and_gradients(
            lambda h, w, r=r: linear_ce_kl(h, w, target, ref_hidden, reduction=r)[which].sum(),
            [hidden, weight],
        )
        for r in ("sum", "none")
    ]
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * float(a.abs().max()))
        assert float((a.double() - b.double()).norm() / a.double().norm()) < 1e-3


@pytest.mark.parametrize("loss", [kl, kl_of_both])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_the_reference_is_nan_in_loss_and_gradients(loss, dtype):
    hidden, weight, target, ref_hidden = case(dtype=dtype, ignored=0)
    ref_hidden[3] = torch.nan
    value, d_hidden, d_weight = loss_and_gradients(
        lambda h, w: loss(h, w, target, ref_hidden, ref_weight=weight.clone()), [hidden, weight]
    )
    assert value.isnan()
    assert d_hidden[3].isnan().all()
    assert d_weight.isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_on_the_meta_device_there_are_shapes(loss, dtype, reduction):
    hidden, weight, target, ref_hidden = (t.to("meta") for t in case(dtype=dtype))
    own = leaves(hidden, weight)
    out = loss(*own, target, ref_hidden, reduction=reduction, softcap=3.0)
    out.sum().backward()
    assert out.is_meta
    assert out.shape == (target.shape if reduction == "none" else ())
    for tensor in own:
        assert tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.dtype == dtype


# ---- what is not asked for is not computed


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_frozen_head_makes_no_buffer_of_its_size(loss, reduction):
    hidden, weight, target, ref_hidden = case(6, 64, 500)
    found = {}
    for frozen in (True, False):
        own = leaves(hidden, weight)
        own[1].requires_grad_(not frozen)
        with Recorded() as found[frozen]:
            loss(*own, target, ref_hidden, reduction=reduction).sum().backward()
        assert (own[1].grad is None) == frozen
    assert found[True].largest_bytes < weight.nbytes
    assert found[False].largest_bytes >= weight.nbytes
    assert found[True].gemms < found[False].gemms


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_there_is_only_the_projection(loss):
    hidden, weight, target, ref_hidden = case(6, 64, 500)
    hidden.requires_grad_()
    with torch.no_grad(), Recorded() as recorded:
        out = loss(hidden, weight, target, ref_hidden)
    assert not out.requires_grad
    assert recorded.gemms == (1 if loss in (ce, uce) else 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_rows_cost_no_gemm(loss, monkeypatch):
    hidden, weight, target, ref_hidden = case(40)
    target[3:] = IGNORED
    seen = []
    project = _chunks.project_rows
    monkeypatch.setattr(
        _chunks, "project_rows", lambda head, h, out: (seen.append(len(h)), project(head, h, out))
    )
    loss(*leaves(hidden, weight), target, ref_hidden).backward()
    counted = int((target != IGNORED).sum())
    assert seen == [counted] * (1 if loss in (ce, uce) else 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_workspace_holds_one_chunk(loss):
    hidden, weight, target, ref_hidden = case(64, 4, 900)
    with Recorded() as recorded:
        loss(*leaves(hidden, weight), target, ref_hidden, chunk_rows=8).backward()
    assert recorded.largest_bytes <= 4 * 8 * 900


def test_backward_hands_the_gradient_over():
    """What forward computed becomes the leaf's gradient without a copy."""
    hidden, weight, target, _ = case(64, 64, 900)
    own = leaves(hidden, weight)
    loss = linear_cross_entropy(*own, target)
    with Recorded() as recorded:
        loss.backward()
    assert recorded.largest_bytes < weight.nbytes


# ---- Torch around it


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_break_for_any_number_of_rows(loss, dtype, reduction):
    torch._dynamo.reset()

    def f(h, w, target, ref_hidden):
        return loss(h, w, target, ref_hidden, reduction=reduction).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9, 14):
        hidden, weight, target, ref_hidden = case(rows, dtype=dtype)
        a, b = (
            loss_and_gradients(
                lambda h, w, g=g, t=target, r=ref_hidden: 2 * g(h, w, t, r), [hidden, weight]
            )
            for g in (compiled, f)
        )
        torch.testing.assert_close(a, b)


def test_compiles_with_inductor():
    torch._dynamo.reset()

    def f(h, w, target, ref_hidden):
        a, b = linear_ce_kl(h.tanh(), w, target, ref_hidden)
        return linear_uce_loss(h, w, target) + a + 2 * b

    compiled = torch.compile(f, fullgraph=True)
    hidden, weight, target, ref_hidden = case()
    a, b = (
        loss_and_gradients(lambda h, w, g=g: g(h, w, target, ref_hidden), [hidden, weight])
        for g in (compiled, f)
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss):
    hidden, weight, target, ref_hidden = case()
    with torch.autocast("cpu", torch.bfloat16):
        own = leaves(hidden, weight)
        out = loss(*own, target, ref_hidden)
    out.backward()
    short = [hidden.bfloat16(), weight.bfloat16()]
    expected = loss_and_gradients(lambda h, w: loss(h, w, target, ref_hidden.bfloat16()), short)
    assert out == expected[0]
    for tensor, gradient in zip(own, expected[1:], strict=True):
        assert tensor.grad.dtype == torch.float32
        assert torch.equal(tensor.grad, gradient.float())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_is_refused(loss, reduction):
    hidden, weight, target, ref_hidden = case()
    own = leaves(hidden, weight)
    out = loss(*own, target, ref_hidden, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"create_graph must be False.*mollm_ops\.reference"):
        torch.autograd.grad(out, own, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_transforms_are_refused_not_zero(loss):
    hidden, weight, target, ref_hidden = case()
    f = partial(loss, weight=weight, target=target, ref_hidden=ref_hidden)
    with pytest.raises(RuntimeError, match=r"must be differentiated with backward\(\)"):
        torch.func.grad(f)(hidden)
    with pytest.raises(RuntimeError, match=r"must be differentiated with backward\(\)"):
        torch.func.jvp(f, (hidden,), (hidden,))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    ops = torch.ops.mollm
    hidden, weight, target, ref_hidden = case(5, 3, 9)
    tensors = (*leaves(hidden, weight), leaves(torch.randn(9))[0] if bias else None)
    constants = tuple(None if t is None else t.detach() for t in tensors)
    head, fixed = ((*three, 1.5, 4.0) for three in (tensors, constants))
    ref = (ref_hidden, weight, None, 1.0, None)
    wants, scale = [True, True, bias], torch.ones(())
    none = [True, False, False]
    opcheck(ops.linear_ce.default, (*fixed, target, scale, 1e-3, IGNORED, False, wants, 2))
    opcheck(ops.linear_ce.default, (*fixed, target, torch.ones(5), None, IGNORED, True, none, None))
    opcheck(ops.linear_kl.default, (*fixed, *ref, target, scale, wants, None))
    opcheck(ops.linear_ce_kl.default, (*fixed, *ref, target, scale, IGNORED, wants, None))
    opcheck(ops.join_ce.default, (torch.rand(5), *head, target, None, IGNORED, False, None))
    opcheck(ops.join_kl.default, (torch.rand(5), *head, *ref, target, None))
    gradients = [torch.zeros(0) if t is None else torch.rand_like(t) for t in constants]
    opcheck(ops.join_gradients.default, (torch.rand(()), *tensors, *gradients))


# ---- errors

COMMON_ERRORS = [
    (ValueError, r"hidden must be \[\.\.\., 6\] to fit weight", {"hidden": torch.ones(11, 7)}),
    (ValueError, r"weight must be \[V, H\]", {"weight": torch.ones(6)}),
    (ValueError, r"weight must be \[V, H\]", {"weight": torch.ones(0, 6)}),
    (TypeError, r"weight must have hidden's dtype float32", {"weight": torch.ones(37, 6).half()}),
    (ValueError, r"weight must be on cpu", {"weight": torch.ones(37, 6, device="meta")}),
    (TypeError, r"hidden must be one of .*int64", {"hidden": torch.ones(11, 6).long()}),
    (ValueError, r"bias must be \[37\], but got \[36\]", {"bias": torch.ones(36)}),
    (ValueError, r"reduction must be", {"reduction": "batchmean"}),
    (ValueError, r"normalizer must be None unless", {"reduction": "sum", "normalizer": 3}),
    (ValueError, r"normalizer must be a positive number", {"normalizer": 0}),
    (ValueError, r"normalizer must be one number", {"normalizer": torch.ones(2)}),
    (ValueError, r"chunk_rows must be at least 1", {"chunk_rows": 0}),
    (ValueError, r"logit_scale must be a positive number, but got 0", {"logit_scale": 0.0}),
    (ValueError, r"softcap must be a positive number or None", {"softcap": -30.0}),
]
TARGET_ERRORS = [
    (ValueError, r"target must be \(11,\) like the rows", {"target": torch.zeros(10).long()}),
    (TypeError, r"target must hold integers", {"target": torch.zeros(11)}),
    (ValueError, r"target must be in \[0, 37\) .*but got 37", {"target": torch.full((11,), 37)}),
    (ValueError, r"target must be in \[0, 37\) .*but got -1", {"target": torch.full((11,), -1)}),
]
REFERENCE_ERRORS = [
    (ValueError, r"ref_hidden must have hidden's leading shape", {"ref_hidden": torch.ones(3, 6)}),
    (ValueError, r"ref_weight must have weight's vocab", {"ref_weight": torch.ones(9, 6)}),
    (TypeError, r"ref_hidden must have hidden's dtype",
     {"ref_hidden": torch.ones(11, 6).half(), "ref_weight": torch.ones(37, 6).half()}),
    (ValueError, r"ref_hidden must be a constant",
     {"ref_hidden": torch.ones(11, 6, requires_grad=True)}),
    (ValueError, r"ref_bias must be \[37\]", {"ref_bias": torch.ones(3)}),
]  # fmt: skip
MASK_ERRORS = [
    (TypeError, r"mask must be bool or integers", {"mask": torch.ones(11)}),
    (ValueError, r"mask must be \(11,\) like the rows", {"mask": torch.ones(12).bool()}),
]
ERRORS = [
    *((f, "target", e) for f in LOG_LOSSES for e in COMMON_ERRORS + TARGET_ERRORS),
    *((linear_kl_div, "ref_hidden", e) for e in COMMON_ERRORS + REFERENCE_ERRORS + MASK_ERRORS),
    *((linear_ce_kl, "target ref_hidden", e)
      for e in COMMON_ERRORS + TARGET_ERRORS + REFERENCE_ERRORS),
    (linear_uce_loss, "target", (ValueError, "eps must be between", {"eps": 1.5})),
    (linear_uce_loss, "target", (ValueError, r"eps must be at least 1\.2e-38", {"eps": 1e-39})),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "needed", "expected"), ERRORS, ids=range(len(ERRORS)))
def test_bad_arguments(loss, needed, expected):
    kind, message, changed = expected
    hidden, weight, target, ref_hidden = case()
    arguments = {"hidden": hidden, "weight": weight}
    given = {"target": target, "ref_hidden": ref_hidden}
    arguments |= {name: given[name] for name in needed.split()} | changed
    with pytest.raises(kind, match=message):
        loss(**arguments)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128256, 50257])
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu_exact_and_without_waiting_for_it(loss, vocab):
    rows = 96
    tensors = case(rows, 64, vocab, torch.bfloat16, scale=2.0, device="cuda")
    hidden, weight, target, ref_hidden = tensors
    counted = (target != IGNORED).sum().cpu()

    def ours():
        return loss_and_gradients(
            lambda h, w: loss(h, w, target, ref_hidden, chunk_rows=rows // 3, normalizer=counted),
            [hidden, weight],
        )

    ours()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_exact_as_plain(got, loss, *tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_captured_in_a_cuda_graph_and_replayed(loss):
    hidden, weight, target, ref_hidden = case(24, 16, 1001, torch.bfloat16, device="cuda")
    own = leaves(hidden, weight)

    def run():
        value = loss(*own, target, ref_hidden, chunk_rows=8)
        return [value.detach(), *torch.autograd.grad(value, own)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    with torch.no_grad():
        own[0].mul_(2)
    graph.replay()
    for a, b in zip(replayed, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
def test_narrow_gradients_of_each_row_do_not_overwrite_logits_that_are_still_read():
    """With reduction="none" cross-entropy writes bfloat16 over float32 logits."""
    tensors = case(96, 64, 50257, torch.bfloat16, scale=2.0, device="cuda")
    hidden, weight, target, ref_hidden = tensors
    found = []
    for reduction in ("none", "none", "mean"):
        own = leaves(hidden, weight)
        ce, kl = linear_ce_kl(*own, target, ref_hidden, reduction=reduction)
        if reduction == "none":
            ce, kl = (loss.sum() / (target != IGNORED).sum() for loss in (ce, kl))
        found.append([ce.detach(), *torch.autograd.grad(ce + kl, own)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for each, mean in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(each, mean, rtol=5e-2, atol=1e-4)


@pytest.mark.parametrize("value", [None, [1.0], "text", 3])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "target", "ref_hidden", "mask"])
def test_what_is_no_tensor_is_named(name, value):
    hidden, weight, target = inputs(3, 4, 5)
    given = {"hidden": hidden, "weight": weight, "target": target, name: value}
    if name in ("bias", "mask") and value is None:
        return
    function = linear_cross_entropy
    if name in ("ref_hidden", "mask"):
        function = linear_kl_div
        given = {"ref_hidden": hidden, **{k: v for k, v in given.items() if k != "target"}}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, but got"):
        function(**given)
