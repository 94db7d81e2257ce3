"""step_time.py for regressions: run with --benchmark-autosave, later --benchmark-compare."""

import pytest
import torch
from gram_throughput import shapes_of
from step_time import MODES, PreparedStep

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mode", MODES)
def test_step(benchmark, mode):
    benchmark.group = "step"
    shapes = shapes_of("one tensor", 10**7)
    gradients = [[torch.randn(s, device=DEVICE) for s in shapes] for _ in range(3)]
    params = [torch.nn.Parameter(torch.randn_like(t)) for t in gradients[0]]
    benchmark(PreparedStep(params, gradients, **MODES[mode]))


def test_adamw_of_torch(benchmark):
    benchmark.group = "step"
    param = torch.nn.Parameter(torch.randn(10**7, device=DEVICE))
    param.grad = torch.randn_like(param)
    benchmark(torch.optim.AdamW([param], fused=True).step)
