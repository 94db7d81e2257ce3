"""uce_loss on logits: definition, properties, Torch integration, bad input."""

import pytest
import torch

from mollm_ops import uce_loss
from mollm_ops.reference import uce_loss_reference
from mollm_ops.uce import _uce_rows, _uce_rows_backward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def case(dtype=torch.float32, lead=(3, 5), vocab=37):
    z = (2 * torch.randn(*lead, vocab)).to(dtype).requires_grad_()
    target = torch.randint(vocab, lead)
    if target.numel() > 2:
        target.view(-1)[0], target.view(-1)[1], target.view(-1)[2] = 0, vocab - 1, -100
    return z, target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5])
def test_matches_the_definition_in_float64(dtype, reduction, eps):
    z, target = case(dtype)
    wide = z.detach().double().requires_grad_()
    upstream = torch.rand(3, 5) if reduction == "none" else torch.rand(())
    got = uce_loss(z, target, eps=eps, reduction=reduction)
    want = uce_loss_reference(wide, target, eps=eps, reduction=reduction)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-9)
    got.backward(upstream.to(got.dtype))
    want.backward(upstream.double())
    tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 5e-6)
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=tolerance, atol=1e-7)


def test_gradcheck():
    z, target = case(torch.float64)
    torch.autograd.gradcheck(lambda z: uce_loss(z, target, reduction="none"), (z,))
    torch.autograd.gradcheck(lambda z: uce_loss(z, target, eps=1e-2), (z,))


def test_upstream_gradient_scales_the_gradient():
    z, target = case()
    three_times = torch.autograd.grad(3 * uce_loss(z, target), z)[0]
    torch.testing.assert_close(three_times, 3 * torch.autograd.grad(uce_loss(z, target), z)[0])


def test_all_rows_ignored_gives_zero():
    z, target = case()
    loss = uce_loss(z, torch.full_like(target, -100))
    loss.backward()
    assert loss.item() == 0
    assert (z.grad == 0).all()


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_input(lead):
    z, target = case(lead=lead)
    loss = uce_loss(z, target)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.shape == z.shape


def test_strided_and_misaligned_logits():
    wide = torch.randn(9, 2 * 41 + 1)
    target = torch.randint(41, (9,))
    for z in (wide[:, ::2][:, :41], wide[:, 1:42], wide.t()[:41].t(), wide[:1, :41].expand(9, 41)):
        want = uce_loss(z.contiguous(), target, reduction="none")
        assert torch.equal(uce_loss(z, target, reduction="none"), want)
        a, b = z.detach().requires_grad_(), z.contiguous().requires_grad_()
        uce_loss(a, target).backward()
        uce_loss(b, target).backward()
        assert torch.equal(a.grad, b.grad)


def test_a_pad_id_may_be_the_ignored_index():
    z, target = case()
    target = target.clamp(min=0)
    want = uce_loss(z, torch.where(target == 0, -100, target))
    assert torch.equal(uce_loss(z, target, ignore_index=0), want)


def test_retain_graph():
    z, target = case()
    loss = uce_loss(z, target)
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * once)


def test_double_backward_is_refused():
    z, target = case()
    with pytest.raises(RuntimeError, match=r"create_graph must be False .* second derivative"):
        torch.autograd.grad(uce_loss(z, target), z, create_graph=True)


def test_torch_func_grad_is_refused_not_wrong():
    z, target = case()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda z: uce_loss(z, target))(z.detach())


def test_opcheck():
    z, target = case(lead=(4,))
    torch.library.opcheck(_uce_rows, (z, target, 1e-3, -100))
    torch.library.opcheck(_uce_rows_backward, (z.detach(), target, torch.rand(4), 1e-3, -100))


def test_compiles_in_one_graph_with_dynamic_rows():
    compiled = torch.compile(uce_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        z, target = case(lead=(rows,))
        compiled(z, target).backward()
        assert torch.equal(z.grad, torch.autograd.grad(uce_loss(z, target), z)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps must be between 0 and 1, both excluded, but got 0.0"),
        ({"eps": 1.0}, ValueError, "eps must be between"),
        ({"eps": float("nan")}, ValueError, "eps must be between"),
        ({"reduction": "avg"}, ValueError, "reduction must be .* but got 'avg'"),
        ({"target": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"target must be \(3, 5\)"),
        ({"target": torch.zeros(3, 5)}, TypeError, "target must hold integers, but got float32"),
        ({"target": torch.full((3, 5), 37)}, ValueError, r"target must be in \[0, 37\) .* got 37"),
        ({"target": torch.full((3, 5), -1)}, ValueError, "but got -1"),
        ({"logits": torch.zeros(3, 5, 37, dtype=torch.int8)}, TypeError, "logits must be one of"),
        ({"logits": torch.zeros(3, 5, 0)}, ValueError, "V >= 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    z, target = case()
    arguments = {"logits": z, "target": target, **change}
    with pytest.raises(error, match=message):
        uce_loss(**arguments)
