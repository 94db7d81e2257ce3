"""How much memory a step takes beyond parameters, gradients and state."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mollm import MOLLMOptimizer

P = 1_000_000
NAMES = ("forget", "kl", "retain")


def peak_bytes(call):
    """The most that was allocated at once during the call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def hand_in(opt, p, gradients):
    for name in NAMES:
        with opt.objective(name):
            p.grad = gradients.pop()


# Of one step with three objectives in float32, in units of one gradient.
@pytest.mark.parametrize(
    ("options", "waiting", "stepping"),
    [
        ({}, 0, 0),
        ({"gradient_memory": "bfloat16"}, 1.5, 0),
        ({"momentum": "per-objective"}, 0, 0),
        ({"metric": "euclidean"}, 0, 0),
        ({"base": "sgd", "momentum": 0.9}, 0, 0),
        ({"base": torch.optim.AdamW}, 0, 3),  # d, and what Torch's own step works with
    ],
    ids=str,
)
def test_a_step_takes_no_more_than_it_says(options, waiting, stepping):
    p = torch.nn.Parameter(torch.zeros(P))
    opt = MOLLMOptimizer([p], **options)
    hand_in(opt, p, [torch.randn(P) for _ in NAMES])
    opt.step()  # makes the state
    opt.zero_grad()
    fresh = [torch.randn(P) for _ in NAMES]
    unit = 4 * P
    assert peak_bytes(lambda: hand_in(opt, p, fresh)) <= (waiting + 0.01) * unit
    assert peak_bytes(opt.step) <= (stepping + 0.01) * unit


def test_the_state_of_every_mode():
    def held(**options):
        p = torch.nn.Parameter(torch.zeros(P))
        opt = MOLLMOptimizer([p], **options)
        hand_in(opt, p, [torch.randn(P) for _ in NAMES])
        opt.step()
        means = opt.state_dict()["mollm"].get("means", {"held": {}})["held"]
        tensors = [t for t in opt.state[p].values() if t.numel() > 1]
        tensors += [t for held in means.values() for t in held.values()]
        return sum(t.nbytes for t in tensors) / (4 * P)

    assert held() == 1  # v
    assert held(state_dtype=torch.bfloat16) == 0.5
    assert held(momentum="per-objective") == 4  # K means, v
    assert held(metric="euclidean") == 2  # m, v
    assert held(base="sgd") == 0


@pytest.mark.parametrize("options", [{}, {"momentum": "per-objective"}], ids=str)
def test_a_step_without_kernels_works_in_slices(options, monkeypatch):
    """As where a GPU's extension was built without nvcc, or with more than eight objectives."""
    for name in ("gram", "update"):
        module = importlib.import_module(f"mollm_ops.{name}")
        monkeypatch.setattr(module, "_has_kernels", lambda *_: False)
    monkeypatch.setattr("mollm_ops.reference.gram._CHUNK", P // 64)
    p = torch.nn.Parameter(torch.zeros(P))
    opt = MOLLMOptimizer([p], **options)
    hand_in(opt, p, [torch.randn(P) for _ in NAMES])
    opt.step()
    opt.zero_grad()
    hand_in(opt, p, [torch.randn(P) for _ in NAMES])
    assert peak_bytes(opt.step) <= 1.0 * 4 * P
