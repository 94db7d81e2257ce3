"""The linear losses: definition, chunking, Torch integration, bad input; all four alike."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mollm_ops
from mollm_ops import (
    linear_ce_kl,
    linear_cross_entropy,
    linear_kl_div,
    linear_losses,
    linear_uce_loss,
    reference,
)
from mollm_ops.reference import ce_rows_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["linear_uce_loss", "linear_cross_entropy", "linear_kl_div", "linear_ce_kl"]
N, H, V = 23, 16, 61


class Case:
    """Inputs of every loss; `loss` calls one by name with those it takes."""

    def __init__(self, dtype=torch.float32, rows=N, bias=True):
        def leaf(*shape, scale=1.0):
            return (scale * torch.randn(*shape)).to(dtype).requires_grad_()

        self.hidden, self.weight = leaf(rows, H), leaf(V, H, scale=0.5)
        self.bias = leaf(V) if bias else None
        self.ref_hidden = torch.randn(rows, H).to(dtype)
        self.ref_weight = (0.5 * torch.randn(V, H)).to(dtype)
        self.target = torch.randint(V, (rows,))
        if rows > 4:
            self.target[0], self.target[1] = 0, V - 1
            self.target[2] = self.target[4] = -100

    def like(self, dtype):
        twin = object.__new__(Case)
        for name, value in vars(self).items():
            if value is not None and value.is_floating_point():
                value = value.detach().clone().to(dtype).requires_grad_(value.requires_grad)
            setattr(twin, name, value)
        return twin

    @property
    def leaves(self):
        leaves = (self.hidden, self.weight, self.bias)
        return [x for x in leaves if x is not None and x.requires_grad]

    def losses(self, name, module=mollm_ops, suffix="", **options):
        f = getattr(module, name + suffix)
        if name in ("linear_kl_div", "linear_ce_kl"):
            options["ref_weight"] = options.get("ref_weight", self.ref_weight)
            rest = (self.ref_hidden,)
        else:
            rest = ()
        if name == "linear_kl_div":
            mask = options.pop("mask", self.target != -100)
            result = f(self.hidden, self.weight, *rest, bias=self.bias, mask=mask, **options)
        else:
            target = options.pop("target", self.target)
            result = f(self.hidden, self.weight, target, *rest, bias=self.bias, **options)
        return result if isinstance(result, tuple) else (result,)

    def gradients(self, losses, upstream=None):
        """Of Σ_i (i + 1) losses_i · upstream."""
        total = sum(
            (i + 1) * (x.double() * (1 if upstream is None else upstream)).sum()
            for i, x in enumerate(losses)
        )
        return torch.autograd.grad(total, self.leaves)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_matches_the_definition_in_float64(name, dtype, reduction, chunk_rows):
    case = Case(dtype)
    wide = case.like(torch.float64)
    upstream = torch.rand(N if reduction == "none" else (), dtype=torch.float64)
    got = case.losses(name, reduction=reduction, chunk_rows=chunk_rows)
    want = wide.losses(name, reference, "_reference", reduction=reduction)
    # Cross-entropy and UCE start from logits rounded to the inputs' dtype, as a linear layer's are.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3}.get(dtype, 3e-2)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(a, b) < tolerance
    gradients = case.gradients(got, upstream), wide.gradients(want, upstream)
    for leaf, a, b in zip(case.leaves, *gradients, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_no_less_exact_than_plain_torch_in_the_same_dtype(dtype, eps):
    case = Case(dtype)
    counted = case.target != -100
    wide = case.like(torch.float64)
    name = "linear_uce_loss" if eps else "linear_cross_entropy"
    ours = case.gradients(case.losses(name))
    want = wide.gradients(wide.losses(name, reference, "_reference"))
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)[counted]
    plain = case.gradients((ce_rows_reference(logits.float(), case.target[counted], eps).mean(),))
    for a, b, exact in zip(ours, plain, want, strict=True):
        assert relative_error(a, exact) <= 1.05 * relative_error(b, exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction):
    case = Case(torch.float64, rows=5)

    def f(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return case.losses(name, reduction=reduction, chunk_rows=2)

    torch.autograd.gradcheck(f, case.leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name):
    case = Case(torch.float64)
    whole = case.losses(name, chunk_rows=N)
    gradients = case.gradients(whole)
    for rows in (1, 5, N - 1):
        parts = case.losses(name, chunk_rows=rows)
        torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(case.gradients(parts), gradients)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_is_not_read(name):
    case = Case(torch.float64)
    counted = case.target != -100
    want = case.gradients(case.losses(name))
    with torch.no_grad():
        case.hidden[~counted] = torch.nan
        case.ref_hidden[~counted] = torch.nan
    got = case.gradients(case.losses(name))
    assert (got[0][~counted] == 0).all()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_normalizer_add_up_to_the_batch(name, as_tensor):
    case = Case(torch.float64)
    want = case.gradients(case.losses(name))
    count = int((case.target != -100).sum())
    normalizer = torch.tensor(count) if as_tensor else count
    total = [torch.zeros_like(x) for x in case.leaves]
    for begin, end in ((0, 3), (3, 10), (10, N)):
        part = case.like(torch.float64)
        part.hidden = case.hidden.detach()[begin:end].requires_grad_()
        part.ref_hidden = case.ref_hidden[begin:end]
        part.target = case.target[begin:end]
        dh, dw, db = part.gradients(part.losses(name, normalizer=normalizer))
        total[0][begin:end] += dh
        total[1] += dw
        total[2] += db
    torch.testing.assert_close(tuple(total), want, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalizer", [None, torch.tensor(0)])
def test_all_rows_ignored_gives_zero(name, normalizer):
    case = Case()
    case.target.fill_(-100)
    losses = case.losses(name, normalizer=normalizer)
    assert all(loss.item() == 0 for loss in losses)
    assert all((g == 0).all() for g in case.gradients(losses))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_empty_input(name, reduction):
    case = Case(rows=0)
    losses = case.losses(name, reduction=reduction)
    assert all(loss.sum().item() == 0 for loss in losses)
    for leaf, gradient in zip(case.leaves, case.gradients(losses), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", NAMES)
def test_leading_shape_strides_and_alignment_do_not_matter(name):
    case = Case(torch.float64, rows=24)
    want = case.losses(name, reduction="none")
    twin = case.like(torch.float64)
    twin.hidden = torch.randn(4, 6, 2 * H + 1, dtype=torch.float64)[..., 1::2].requires_grad_()
    twin.weight = torch.randn(H, V + 1, dtype=torch.float64)[:, 1:].t().requires_grad_()
    with torch.no_grad():
        twin.hidden.copy_(case.hidden.view(4, 6, H))
        twin.weight.copy_(case.weight)
    twin.target = case.target.view(6, 4).t().contiguous().t().reshape(4, 6)
    twin.ref_hidden = case.ref_hidden.view(4, 6, H)
    got = twin.losses(name, reduction="none")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.view(4, 6))
    got, want = twin.gradients(got), case.gradients(want)
    torch.testing.assert_close(got[0], want[0].view(4, 6, H))
    torch.testing.assert_close(got[1:], want[1:])


def test_tied_reference_weight_is_a_constant():
    case = Case(torch.float64)
    tied = linear_kl_div(case.hidden, case.weight, case.ref_hidden)
    fixed = linear_kl_div(case.hidden, case.weight, case.ref_hidden, case.weight.detach().clone())
    case.bias = None
    torch.testing.assert_close(case.gradients((tied,)), case.gradients((fixed,)))


def test_tied_embedding_collects_both_gradients():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    ids, target = torch.randint(V, (9,)), torch.randint(V, (9,))
    got = torch.autograd.grad(linear_cross_entropy(weight[ids].tanh(), weight, target), weight)
    logits = weight[ids].tanh() @ weight.t()
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), weight)
    torch.testing.assert_close(got, want)


def test_kl_at_the_reference_has_gradient_exactly_zero():
    for dtype in DTYPES:
        case = Case(dtype, bias=False)
        loss = linear_kl_div(case.hidden, case.weight, case.hidden.detach())
        assert loss.item() == 0
        assert all((g == 0).all() for g in case.gradients((loss,)))


def test_kl_of_bfloat16_operands_keeps_its_digits_near_the_reference():
    """Logits rounded to bfloat16 lose p - p_ref here: the error is 4% and more."""
    hidden = torch.randn(32, 64).bfloat16().requires_grad_()
    weight = torch.randn(997, 64).mul(0.3).bfloat16()
    ref_hidden = (hidden.detach().float() + 0.02 * torch.randn(32, 64)).bfloat16()
    loss = linear_kl_div(hidden, weight, ref_hidden)
    gradient = torch.autograd.grad(loss, hidden)[0]
    wide = hidden.detach().double().requires_grad_()
    want = reference.linear_kl_div_reference(wide, weight.double(), ref_hidden.double())
    assert abs(loss.item() / want.item() - 1) < 1e-5
    assert relative_error(gradient, torch.autograd.grad(want, wide)[0]) < 5e-3


def test_bfloat16_dw_over_chunks_is_as_exact_as_one_gemm():
    M, hidden_size, vocab = 16384, 32, 512
    hidden = torch.randn(M, hidden_size).bfloat16()
    weight = torch.randn(vocab, hidden_size).mul(0.2).bfloat16().requires_grad_()
    target = torch.randint(vocab, (M,))
    z = (hidden @ weight.detach().t()).double().requires_grad_()
    d_logits = torch.autograd.grad(ce_rows_reference(z, target, None).sum(), z)[0]
    want = d_logits.t() @ hidden.double()
    errors = []
    for rows in (M, M // 8):
        loss = linear_cross_entropy(hidden, weight, target, reduction="sum", chunk_rows=rows)
        errors.append(relative_error(torch.autograd.grad(loss, weight)[0], want))
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph(name, reduction):
    case = Case()
    losses = case.losses(name, reduction=reduction)
    total = sum(2 * x.sum() for x in losses)
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in case.leaves]
    total.backward()
    for leaf, gradient in zip(case.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ce_and_kl_go_backward_separately_without_retaining(reduction, order):
    case = Case(torch.float64)
    both = case.losses("linear_ce_kl", reduction=reduction)
    alone = [*case.losses("linear_cross_entropy", reduction=reduction)]
    alone += case.losses("linear_kl_div", reduction=reduction)
    for i in order:
        want = torch.autograd.grad(alone[i].sum(), case.leaves)
        torch.testing.assert_close(torch.autograd.grad(both[i].sum(), case.leaves), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(name, reduction):
    case = Case()
    loss = sum(x.sum() for x in case.losses(name, reduction=reduction))
    with pytest.raises(RuntimeError, match=r"create_graph must be False .* second derivative"):
        torch.autograd.grad(loss, case.leaves, create_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_grad_is_refused_not_wrong(name):
    case = Case()
    hidden = case.hidden.detach()

    def f(x):
        case.hidden = x
        return case.losses(name)[0]

    with pytest.raises(RuntimeError):
        torch.func.grad(f)(hidden)


class LargestTensor(TorchDispatchMode):
    """Counts the tensors with as many elements as the head, made by operators or inside ours."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.made = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        made = [x for x in outputs if isinstance(x, torch.Tensor) and x.numel() >= self.elements]
        inputs = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        self.made += sum(x.data_ptr() not in inputs for x in made)
        return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_costs_no_buffer_of_its_size(name, frozen, monkeypatch):
    """Tokens are few, so whatever has V H elements was made for the gradient of the head."""
    case = Case(torch.bfloat16, rows=3, bias=False)
    case.weight.requires_grad_(not frozen)
    made = []
    original = linear_losses.losses_in_chunks

    def counted(*args, **kwargs):
        with LargestTensor(V * H) as largest:
            result = original(*args, **kwargs)
        made.append(largest.made)
        return result

    monkeypatch.setattr(linear_losses, "losses_in_chunks", counted)
    monkeypatch.setattr("mollm_ops._chunks._UPCAST_BYTES", 4 * H * 8)
    case.gradients(case.losses(name, chunk_rows=2))
    assert (made[0] == 0) == frozen


def test_without_a_gradient_nothing_but_the_loss_is_computed(monkeypatch):
    case = Case(bias=False)
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or original(*a, **k))
    with torch.no_grad():
        case.losses("linear_uce_loss")
    assert len(products) == 1


def test_the_gradient_of_the_head_is_handed_over_without_a_copy():
    case = Case(bias=False)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (V, H):
                made.append(func)
            return out

    loss = linear_cross_entropy(case.hidden, case.weight, case.target)
    with Watch():
        loss.backward()
    assert not [f for f in made if "clone" in str(f) or "mul.Tensor" in str(f)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(name, dtype):
    case = Case()
    with torch.autocast("cpu", dtype=dtype):
        got = case.losses(name)
    low = case.like(dtype)
    want = low.losses(name)
    assert torch.equal(got[0], want[0])
    for leaf, a, b in zip(case.leaves, case.gradients(got), low.gradients(want), strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph_with_dynamic_rows(name, reduction):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def total(hidden, weight, bias, target, ref_hidden, ref_weight):
        rest = {"bias": bias, "reduction": reduction}
        if name == "linear_kl_div":
            args = (ref_hidden, ref_weight)
            rest["mask"] = target != -100
        elif name == "linear_ce_kl":
            args = (target, ref_hidden, ref_weight)
        else:
            args = (target,)
        result = getattr(mollm_ops, name)(hidden, weight, *args, **rest)
        return sum(x.sum() for x in (result if isinstance(result, tuple) else (result,)))

    for rows in (7, N):
        case = Case(rows=rows)
        tensors = (case.target, case.ref_hidden, case.ref_weight)
        got = torch.autograd.grad(total(*case.leaves, *tensors), case.leaves)
        losses = case.losses(name, reduction=reduction)
        want = torch.autograd.grad(sum(x.sum() for x in losses), case.leaves)
        torch.testing.assert_close(got, want)


def test_compiles_with_inductor():
    case = Case(bias=False)
    compiled = torch.compile(linear_uce_loss, fullgraph=True, dynamic=True)
    got = compiled(case.hidden * 2, case.weight, case.target)
    want = linear_uce_loss(case.hidden * 2, case.weight, case.target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(case.gradients((got,)), case.gradients((want,)))


def test_opcheck():
    case = Case(rows=5)
    head = (case.hidden, case.weight, case.bias)
    fixed = tuple(x.detach() for x in head)
    ref = (case.ref_hidden, case.ref_weight, None)
    target, scale, mask = case.target.clamp(min=0), torch.tensor(0.5), torch.zeros(5).long()
    losses, ones = torch.rand(5), [torch.ones_like(x) for x in fixed]
    wants = [True, True, False]
    check = torch.library.opcheck
    check(linear_losses._linear_ce, (*fixed, target, scale, 1e-3, -100, wants, 2))
    check(linear_losses._linear_kl, (*fixed, *ref, mask, scale, wants, None))
    check(linear_losses._linear_ce_kl, (*fixed, *ref, target, scale, -100, wants, None))
    check(linear_losses._join_gradients, (torch.tensor(1.0), *head, *ones))
    check(linear_losses._join_ce, (losses, *head, target, None, -100, None))
    check(linear_losses._join_kl, (losses, *head, *ref, mask, 3))


def test_device_errors_name_both_devices():
    case = Case()
    with pytest.raises(ValueError, match="weight must be on cpu, but got meta"):
        linear_cross_entropy(case.hidden, case.weight.to("meta"), case.target)
    with pytest.raises(ValueError, match="target must be on cpu, but got meta"):
        linear_cross_entropy(case.hidden, case.weight, case.target.to("meta"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.zeros(N, H + 1)},
            ValueError,
            r"hidden must be \[..., 16\] .* \[23, 17\]",
        ),
        ({"weight": torch.zeros(V)}, ValueError, r"weight must be \[V, H\] with V >= 1"),
        ({"weight": torch.zeros(V, H).half()}, TypeError, "hidden's dtype float32, .* float16"),
        ({"hidden": torch.zeros(N, H).long()}, TypeError, "hidden must be one of .* got int64"),
        ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must be \[61\], but got \[62\]"),
        ({"target": torch.zeros(N - 1).long()}, ValueError, r"target must be \(23,\)"),
        ({"target": torch.zeros(N)}, TypeError, "target must hold integers"),
        ({"target": torch.full((N,), V)}, ValueError, r"target must be in \[0, 61\) .* got 61"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be a positive number, but got 0.0"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer must be None unless"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be one number"),
        ({"reduction": "max"}, ValueError, "reduction must be .* but got 'max'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, but got 0"),
        ({"ref_hidden": torch.zeros(N - 1, H)}, ValueError, "ref_hidden must have hidden's lead"),
        ({"ref_hidden": torch.zeros(N, H).double()}, TypeError, "ref_"),
        (
            {"ref_hidden": torch.zeros(N, H, requires_grad=True)},
            ValueError,
            "ref_hidden must be a constant, .* detach it",
        ),
        ({"ref_weight": torch.zeros(V + 1, H)}, ValueError, "ref_weight must have weight's vocab"),
    ],
)
def test_bad_input_is_named(change, error, message):
    case = Case()
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "target": case.target,
        "ref_hidden": case.ref_hidden,
        "ref_weight": case.ref_weight,
        **change,
    }
    with pytest.raises(error, match=message):
        linear_ce_kl(**arguments)


def test_bad_eps_and_masks_are_named():
    case = Case()
    with pytest.raises(ValueError, match="eps must be between 0 and 1, both excluded, but got 2"):
        linear_uce_loss(case.hidden, case.weight, case.target, eps=2)
    for mask, error in ((torch.ones(N - 1), TypeError), (torch.ones(N - 1).bool(), ValueError)):
        with pytest.raises(error, match="mask must be"):
            linear_kl_div(case.hidden, case.weight, case.ref_hidden, mask=mask)
