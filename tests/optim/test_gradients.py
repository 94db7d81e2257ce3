"""GradientStore: what waits where, and in what order it comes back."""

from __future__ import annotations

import pytest
import torch

from mollm.optim.gradients import GradientStore

NAMES = ("a", "b")


def filled(memory):
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)]
    store = GradientStore(NAMES, memory)
    for k, name in enumerate(NAMES):
        store.lend(name, params)
        for p in params[k:]:
            p.grad = torch.full_like(p, 1.0 + k)
        assert store.take(name, params) == 3 - k
    return store, params


@pytest.mark.parametrize("memory", ["as-produced", "bfloat16", "host"])
def test_every_gradient_comes_back_once_in_order(memory):
    store, params = filled(memory)
    store.bucket_bytes = 60  # two objectives' gradients of seven floats
    seen = []
    for some, lists in store.buckets(params):
        assert len(lists) == 2
        assert all(len(tensors) == len(some) for tensors in lists)
        seen += some
        for p, first, second in zip(some, *lists, strict=True):
            assert torch.equal(first.float(), torch.ones_like(p))
            assert (second is None) == (p is params[0])
    assert all(a is b for a, b in zip(seen, params, strict=True))


def test_only_host_gradients_come_in_buckets():
    for memory, expected in (("as-produced", 1), ("host", 3)):
        store, params = filled(memory)
        store.bucket_bytes = 1
        assert len(list(store.buckets(params))) == expected


def test_lending_and_taking_back_accumulates():
    for memory in ("as-produced", "bfloat16", "host"):
        store, params = filled(memory)
        store.lend("a", params)
        for p in params:
            assert p.grad.dtype == p.dtype
            p.grad += 1
        store.take("a", params)
        _, (first, _) = next(store.buckets(params))
        assert torch.equal(first[1].float(), torch.full((5,), 2.0))
        assert first[1].dtype == (torch.bfloat16 if memory == "bfloat16" else torch.float32)


def test_bfloat16_halves_the_bytes_that_wait():
    def held(memory):
        store, _ = filled(memory)
        return sum(t.nbytes for d in store._held.values() for t in d.values())

    assert held("bfloat16") * 2 == held("as-produced")


def test_an_unknown_memory_is_refused():
    with pytest.raises(ValueError, match=r"memory must be one of .*, but got 'disk'"):
        GradientStore(NAMES, "disk")
