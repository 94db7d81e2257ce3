"""Options of the optimizer that would do nothing are refused by itself; others change a step."""

import pytest
import torch

from mollm import MOLLMOptimizer

PAIRS = [
    ({"mean_beta": 0.5}, {}, {"momentum": "per-objective"}),
    ({"mean_beta": 0.0}, {"momentum": 0.9, "base": "sgd"}, {"momentum": "per-objective"}),
    ({"normalize": True}, {"direction": "dual"}, {"direction": "mgda"}),
    ({"length": "first"}, {}, {"normalize": True}),
    ({"length": "min-norm"}, {"direction": "sum", "normalize": True}, {"direction": "dual"}),
    ({"length": "first"}, {"direction": lambda gram: gram[0] * 0 + 1}, {"direction": "dual"}),
]


def walked(**options):
    """Where two parameters are after three steps."""
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = MOLLMOptimizer([x], lr=0.1, objectives=("a", "b"), **{"base": "sgd", **options})
    for _ in range(3):
        optimizer.backward({"a": (x - 3).square().sum(), "b": 20 * (x[0] + x[1] - 1).square()})
        optimizer.step()
    return x.detach()


@pytest.mark.parametrize(("option", "beside", "other"), PAIRS)
def test_an_option_is_refused_where_it_would_do_nothing(option, beside, other):
    ((name, value),) = option.items()
    words = rf"^{name} must be left out with.*, but got {value!r}: (leave it out|add that)"
    with pytest.raises(ValueError, match=words):
        MOLLMOptimizer([torch.nn.Parameter(torch.ones(2))], **option, **beside)
    walked(**beside)
    assert not torch.equal(walked(**option, **other), walked(**other))


@pytest.mark.parametrize("usual", [{"mean_beta": 0.9}, {"normalize": False}, {"length": "mean"}])
def test_what_is_so_anyway_may_be_said(usual):
    direction = "dual" if "normalize" in usual else "upgrad"
    assert torch.equal(walked(direction=direction, **usual), walked(direction=direction))


@pytest.mark.parametrize("more", [{}, {"metric": "euclidean", "momentum": "per-objective"}])
def test_a_first_beta_without_a_first_moment_is_refused(more):
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"the first of betas must be .* but got 0\.5: leave"):
        MOLLMOptimizer(params, betas=(0.5, 0.99), **more)
    for first in (0, 0.9):
        MOLLMOptimizer(params, betas=(first, 0.99), **more)
    MOLLMOptimizer(params, betas=(0.5, 0.99), metric="euclidean")
