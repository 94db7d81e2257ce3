"""Embeddings and head in slices: whoever reads them, and however often."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mollm.models.matrices import Matrices

IDS = torch.tensor([[0, 3, 3, 17], [5, 16, 0, 19]])


def matrix(rows=20, width=64):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(rows, width, dtype=torch.float64))


def gradients(weight, losses, elements=4 * 64):
    """Of K losses as autograd makes them, and from slices and what is left to autograd."""
    plain = [torch.autograd.grad(loss(), weight)[0] for loss in losses]
    matrices = Matrices([weight], elements, len(losses))
    with matrices.recording():
        made = [loss() for loss in losses]
    rest = []
    for k, loss in enumerate(made):
        whole, *probed = torch.autograd.grad(loss, [weight, *matrices.probes], allow_unused=True)
        matrices.arrive(k, probed)
        rest.append(whole)
    spans = list(matrices.slices(weight))
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(weight)
    parts = [matrices.rows(weight, *span) for span in spans]
    found = []
    for k, whole in enumerate(rest):
        mine = [
            p[k] if p[k] is not None else torch.zeros_like(weight[b:e])
            for p, (b, e) in zip(parts, spans, strict=True)
        ]
        found.append(torch.cat(mine) + (0 if whole is None else whole))
    return plain, found, rest


def assert_equal(weight, *losses):
    plain, found, rest = gradients(weight, losses)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    return rest


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_a_lookup(padding):
    weight = matrix()
    ramp = torch.linspace(-1, 1, 8 * 64, dtype=torch.float64).reshape(2, 4, 64)

    def loss():
        return (F.embedding(IDS, weight, padding) * ramp).square().sum()

    assert assert_equal(weight, loss, lambda: loss() * 2) == [None, None]


def test_a_module_that_scales_what_it_looks_up():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    layer = Scaled(20, 64, padding_idx=0, _weight=matrix())
    assert assert_equal(layer.weight, lambda: layer(IDS).square().sum()) == [None]


def test_what_was_looked_up_may_be_changed_in_place():
    weight = matrix()

    def loss():
        x = F.embedding(IDS, weight)
        x *= 3
        return x.square().sum()

    assert assert_equal(weight, loss) == [None]


@pytest.mark.parametrize("bias", [None, torch.ones(20, dtype=torch.float64)])
def test_a_projection(bias):
    weight, hidden = matrix(), torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)

    def loss():
        return F.linear(hidden, weight, bias).logsumexp(-1).sum()

    assert assert_equal(weight, loss, lambda: loss().square()) == [None, None]


def test_a_projection_of_no_token():
    weight = matrix()

    def loss():
        rest = F.linear(torch.ones(2, 64, dtype=torch.float64), weight).square().sum()
        return F.linear(weight.new_zeros(0, 64), weight).sum() + rest

    assert assert_equal(weight, loss) == [None]


def test_ids_may_change_and_hidden_states_may_not():
    weight, ids, hidden = matrix(), IDS.clone(), torch.ones(3, 64, dtype=torch.float64)
    matrices = Matrices([weight], 256, 1)
    with matrices.recording():
        loss = F.embedding(ids, weight).square().sum()
        other = F.linear(hidden, weight).square().sum()
    matrices.arrive(0, torch.autograd.grad(loss, matrices.probes, allow_unused=True))
    ids.zero_()
    plain = torch.autograd.grad(F.embedding(IDS, weight).square().sum(), weight)[0]
    torch.testing.assert_close(matrices.rows(weight, 0, 20)[0], plain)
    matrices.arrive(0, torch.autograd.grad(other, matrices.probes, allow_unused=True))
    hidden.zero_()
    with pytest.raises(RuntimeError, match="what the head reads was changed in place"):
        matrices.rows(weight, 0, 20)


def test_a_projection_of_more_tokens_than_a_matrix_is_wide_is_left_to_autograd():
    weight, hidden = matrix(), torch.randn(40, 64, dtype=torch.float64)

    def loss():
        return F.linear(hidden, weight).logsumexp(-1).sum()

    first, second = assert_equal(weight, loss, lambda: 2 * loss())
    assert first is None  # 40 tokens fit
    assert second is not None  # 80 do not


def test_a_tied_matrix_and_any_other_reading():
    weight = matrix()

    def loss():
        hidden = F.embedding(IDS, weight).tanh()
        return F.linear(hidden, weight).logsumexp(-1).sum() + weight.square().mean()

    (rest,) = assert_equal(weight, loss)
    torch.testing.assert_close(rest, 2 * weight.detach() / weight.numel())


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1e9}], ids=str)
def test_a_lookup_with_rules_of_its_own_is_left_to_autograd(options):
    weight = matrix()
    (rest,) = assert_equal(weight, lambda: F.embedding(IDS, weight, **options).square().sum())
    assert rest is not None


def test_without_gradients_nothing_is_noted():
    weight = matrix()
    matrices = Matrices([weight], 256, 1)
    with matrices.recording(), torch.no_grad():
        F.linear(F.embedding(IDS, weight), weight)
    assert matrices.probes == []


@pytest.mark.parametrize(("rows", "width"), [(20, 64), (1000, 48), (7, 256), (33, 5)])
def test_slices_begin_where_a_scale_of_a_state_in_8_bits_does(rows, width):
    weight = matrix(rows, width)
    spans = list(Matrices([weight], 3000, 1).slices(weight))
    assert all(begin * width % 256 == 0 for begin, _ in spans)
    assert sum(end - begin for begin, end in spans) == rows
