"""ObjectiveMeans: decay, bias correction and state."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mollm.optim.means import ObjectiveMeans, moved


def test_the_corrected_mean_of_a_constant_is_the_constant():
    p = torch.nn.Parameter(torch.zeros(4))
    means = ObjectiveMeans(0.9)
    for _ in range(5):
        lists = [[torch.full((4,), 3.0)]]
        moving = means.moving(("a",), [p], lists)
        (mean,) = moved(moving, lists)[0]
        torch.testing.assert_close(
            mean.double() / means.correction(p.device), torch.full((4,), 3.0).double()
        )
        means.count(None)


def test_a_mean_without_a_gradient_decays_and_an_unknown_one_stays_none():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    means = ObjectiveMeans(0.5)
    lists = [[torch.ones(2), None]]
    moved(means.moving(("a",), params, lists), lists)
    lists = [[None, None]]
    moving = means.moving(("a",), params, lists)
    assert torch.equal(lists[0][0], torch.zeros(2))
    assert lists[0][1] is None
    assert moved(moving, lists)[0][1] is None
    assert torch.equal(moving.means[0][0], torch.full((2,), 0.25))


def test_state_round_trip_does_not_share_memory():
    p = torch.nn.Parameter(torch.zeros(2))
    means = ObjectiveMeans(0.9)
    lists = [[torch.ones(2)]]
    moved(means.moving(("a",), [p], lists), lists)
    means.count(None)
    other = ObjectiveMeans(0.9)
    other.load_state_dict(means.state_dict([p]), [p])
    assert torch.equal(other.correction(p.device), means.correction(p.device))
    held = other.moving(("a",), [p], lists).means[0][0]
    assert torch.equal(held, means.moving(("a",), [p], lists).means[0][0])
    assert held.data_ptr() != means.moving(("a",), [p], lists).means[0][0].data_ptr()


def test_beta_out_of_range():
    with pytest.raises(ValueError, match=r"mean_beta must be in \[0, 1\), but got 1.0"):
        ObjectiveMeans(1.0)


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations run again on the very same memory."""

    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.tape:
            again = func(*args, **kwargs)
            if again.data_ptr() != out.data_ptr():
                out.copy_(again)


def test_a_replayed_step_counts():
    means, proceed = ObjectiveMeans(0.9), torch.tensor(True)
    for _ in range(3):
        means.correction(proceed.device)
        means.count(proceed)
    graph = Recorded()
    with graph:
        correction = means.correction(proceed.device)
        means.count(proceed)
    for t in range(5, 9):
        graph.replay()
        torch.testing.assert_close(float(correction), 1 - 0.9**t)
    assert means.state_dict([])["steps"] == 8
