"""loss_throughput.py for regressions: run with --benchmark-autosave, later --benchmark-compare."""

import pytest
import torch
from loss_throughput import GEMMS, QUICK_SHAPES, Inputs, backward_of, floor, ours

pytest.importorskip("pytest_benchmark")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def inputs(request):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Inputs.make(*QUICK_SHAPES[0], request.param, device)


@pytest.mark.parametrize("loss", GEMMS)
def test_loss(benchmark, inputs, loss):
    inputs.weight.requires_grad_("frozen" not in loss)
    benchmark.group = f"{loss}, {inputs.hidden.dtype}"
    benchmark(backward_of(ours(loss), inputs))


@pytest.mark.parametrize("loss", GEMMS)
def test_floor(benchmark, inputs, loss):
    benchmark.group = f"{loss}, {inputs.hidden.dtype}"
    benchmark(floor(loss, inputs))
