"""The Triton kernels without a GPU: interpreted against float64, compiled for every target."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import needs_interpreter, needs_ptxas, run_interpreted  # noqa: E402
from device_code import LLAMA_3, SHORT, compiled_rows, nvdisasm  # noqa: E402

from mollm_ops import _rows_triton  # noqa: E402
from mollm_ops._rows_triton import config_of, kl_rows_kernel, log_rows_kernel  # noqa: E402


@needs_interpreter
def test_interpreted():
    run_interpreted("interpreted_rows.py")


FLAGS = list(itertools.product([False, True], repeat=2))
LOG = [
    (
        log_rows_kernel,
        dtype,
        dtype,
        {"HAS_EPS": eps, "HAS_GRADIENT": gradient, "HAS_CAP": capped, "NARROW": False},
    )
    for dtype in SHORT
    for eps, gradient in FLAGS
    for capped in (False, True)
] + [
    (
        log_rows_kernel,
        torch.float32,
        narrow,
        {"HAS_EPS": False, "HAS_GRADIENT": True, "HAS_CAP": capped, "NARROW": True},
    )
    for narrow in SHORT
    if narrow != torch.float32
    for capped in (False, True)
]
KL = [
    (
        kl_rows_kernel,
        torch.float32,
        gradient,
        {
            "HAS_CAP": capped,
            "HAS_REF_CAP": capped,
            "HAS_CE": ce,
            "HAS_KL_GRADIENT": wanted,
            "HAS_CE_GRADIENT": ce and wanted,
            "NARROW": gradient != torch.float32,
        },
    )
    for gradient in SHORT
    for ce, wanted in FLAGS
    for capped in (False, True)
]


def does_all(constants):
    """Narrow gradients of log rows are asked for without UCE's ε alone."""
    left_out = {"NARROW"} | ({"HAS_EPS"} if constants["NARROW"] else set())
    return all(wanted for name, wanted in constants.items() if name not in left_out)


EVERY = [
    # By default those that do everything at once, and for the H100 all of bfloat16.
    pytest.param(
        *case,
        capability,
        marks=()
        if does_all(case[3]) or (capability == 90 and torch.bfloat16 in case[1:3])
        else pytest.mark.soak,
    )
    for case in LOG + KL
    for capability in (90, 80, 100)
]


@needs_ptxas
@pytest.mark.parametrize(("kernel", "dtype", "gradient", "constants", "capability"), EVERY)
def test_compiles_without_spills(kernel, dtype, gradient, constants, capability, tmp_path):
    code, shared = compiled_rows(kernel, (dtype, gradient), constants, capability, tmp_path)
    assert code.spilled == 0
    most = _rows_triton.MAX_KL_BLOCK if kernel is kl_rows_kernel else _rows_triton.MAX_BLOCK
    assert code.registers * 32 * config_of(LLAMA_3, most).num_warps <= 65536
    assert shared <= 48 * 1024


@needs_ptxas
@pytest.mark.skipif(nvdisasm() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_blocks_of_a_row_are_on_their_way(dtype, tmp_path):
    """An H200 wants 29 kB on their way to a multiprocessor: see docs/performance.md."""
    flags = {"HAS_EPS": True, "HAS_GRADIENT": True, "HAS_CAP": False, "NARROW": False}
    code, _ = compiled_rows(log_rows_kernel, (dtype, dtype), flags, 90, tmp_path)
    config = config_of(LLAMA_3)
    flying = max(loop.loads for loop in code.loops) * 16 * 32 * config.num_warps
    assert flying == 2 * config.BLOCK * dtype.itemsize
    assert flying >= 29_000


def test_one_configuration_per_vocabulary_size():
    assert config_of(128256) == (8192, 32)
    assert config_of(49152) == (8192, 32)
    assert config_of(100) == (128, 1)
    assert config_of(128256, _rows_triton.MAX_KL_BLOCK) == (4096, 16)
    assert _rows_triton.MAX_BLOCK == 8192
