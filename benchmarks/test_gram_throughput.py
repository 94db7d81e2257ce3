"""gram_throughput.py for regressions: run with --benchmark-autosave, later --benchmark-compare."""

import pytest
import torch
from gram_throughput import shapes_of

from mollm_ops import combine, gram, gram_direction

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def gradients(request):
    shapes = shapes_of("one tensor", 10**7)
    return [[torch.randn(s, device=DEVICE).to(request.param) for s in shapes] for _ in range(3)]


def test_gram(benchmark, gradients):
    benchmark.group = f"{gradients[0][0].dtype}"
    benchmark(lambda: gram(gradients))


def test_combine(benchmark, gradients):
    benchmark.group = f"{gradients[0][0].dtype}"
    weights = torch.full((3,), 1 / 3, dtype=torch.float64, device=DEVICE)
    out = [torch.empty_like(t) for t in gradients[0]]
    benchmark(lambda: combine(gradients, weights, out=out))


def test_gram_direction(benchmark, gradients):
    benchmark.group = f"{gradients[0][0].dtype}"
    out = [torch.empty_like(t) for t in gradients[0]]
    benchmark(lambda: gram_direction(gradients, out=out))
