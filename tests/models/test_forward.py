"""Final hidden states: the same whatever compiled the model, and copies that are their own."""

import functools
import types

import pytest
import tiny
import torch

from mollm.errors import UsageError
from mollm.models.adapters import uncompiled
from mollm.models.forward import frozen_copy, hidden_states

IDS = torch.arange(5, 17).reshape(2, 6)
MASKS = {"whole": torch.ones_like(IDS), "padded": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}


def by_function(model):
    return torch.compile(model, backend="eager")


def by_method(model):
    model.compile(backend="eager")
    return model


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def by_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def by_layers_forward(model):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")
    return model


def by_head(model):
    model.lm_head.forward = torch.compile(model.lm_head.forward, backend="eager")
    return model


WAYS = [by_function, by_method, by_forward, by_layer, by_layers_forward, by_head]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["states", "logits"])
@torch.no_grad()
def test_a_compiled_model_has_the_states_and_afterwards_the_logits_of_a_plain_one(way, first):
    plain, compiled = tiny.model(), way(tiny.model())
    logits = plain(input_ids=IDS).logits
    if first == "logits":
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits)
    for _ in range(2):
        for mask in MASKS.values():
            found, expected = (hidden_states(m, IDS, mask) for m in (compiled, plain))
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits)


def test_states_can_be_taken_within_a_compiled_function():
    model = tiny.model()
    compiled = torch.compile(lambda ids, mask: hidden_states(model, ids, mask), backend="eager")
    for mask in MASKS.values():
        found, expected = compiled(IDS, mask), hidden_states(model, IDS, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
        gradients = [
            torch.autograd.grad(states[mask.bool()].square().sum(), list(model.parameters())[1])[0]
            for states in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("way", [way for way in WAYS if way is not by_head])
@torch.no_grad()
def test_a_frozen_copy_of_what_was_compiled_does_not_follow_the_model(way):
    model, _ = uncompiled(way(tiny.model()))
    copied = frozen_copy(model)
    before = hidden_states(copied, IDS, MASKS["whole"])
    for p in model.parameters():
        p.mul_(1.5)
    assert torch.equal(hidden_states(copied, IDS, MASKS["whole"]), before)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", ["method", "partial"])
@torch.no_grad()
def test_a_layer_with_a_forward_of_its_own_is_copied_with_it(kind):
    model = tiny.model()
    layer = model.model.layers[0]
    if kind == "method":
        layer.forward = types.MethodType(lambda self, h, **_: h + self.mlp(h), layer)
    else:
        layer.forward = functools.partial(layer.forward)
    expected, copied = hidden_states(model, IDS, MASKS["whole"]), frozen_copy(model)
    for p in model.parameters():
        p.mul_(1.5)
    torch.testing.assert_close(hidden_states(copied, IDS, MASKS["whole"]), expected)


def test_a_layer_whose_forward_a_copy_would_share_is_refused():
    model = tiny.model()
    layer, own = model.model.layers[1], model.model.layers[1].forward
    for shared in (lambda *args, **kwargs: own(*args, **kwargs), lambda *a, _own=own: _own(*a)):
        layer.forward = shared
        with pytest.raises(UsageError, match=r"the forward of model\.layers\.1 was replaced"):
            frozen_copy(model)
