"""The Triton kernels without a GPU: interpreted against float64, compiled for every target."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import SHORT, compile_kernel, needs_ptxas, run_interpreted, spills  # noqa: E402
from device_code import loops_of, nvdisasm  # noqa: E402

from mollm_ops import _rows_triton  # noqa: E402
from mollm_ops._rows_triton import config_of, kl_rows_kernel, log_rows_kernel  # noqa: E402

VOCAB = 128256
FLOATS = ("eps", "rest", "logit_scale", "softcap", "ref_logit_scale", "ref_softcap")


def test_interpreted():
    run_interpreted("interpreted_rows.py")


def compile_rows(kernel, dtype, gradient, capability, constants, tmp_path):
    """ptxas's report of one kernel at the vocabulary of Llama 3, all strides divisible by 16."""
    is_kl = kernel is kl_rows_kernel
    config = config_of(VOCAB, _rows_triton.MAX_KL_BLOCK) if is_kl else config_of(VOCAB)
    constants = {**constants, "BLOCK": config.BLOCK}
    types = {}
    for name in kernel.arg_names:
        if name in FLOATS:
            types[name] = "fp32"
        elif name in ("logits", "ref_logits"):
            types[name] = f"*{SHORT[dtype]}"
        elif name.endswith("gradient"):
            types[name] = f"*{SHORT[gradient]}"
        elif name == "target":
            types[name] = "*i64"
        elif name.endswith(("losses", "scale")):
            types[name] = "*fp32"
        else:
            types[name] = "i32"
    plain = (*FLOATS, "R", *constants)
    aligned = [n for n in kernel.arg_names if n not in plain and "scale_stride" not in n]
    registers = _rows_triton.KL_REGISTERS if is_kl else None
    return compile_kernel(
        kernel, types, constants, aligned, capability, config.num_warps, tmp_path, registers
    )


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


@needs_ptxas
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "dtype", "gradient", "constants"), LOG + KL)
def test_compiles_without_spills(kernel, dtype, gradient, constants, capability, tmp_path):
    report, metadata = compile_rows(kernel, dtype, gradient, capability, constants, tmp_path)
    assert spills(report) == 0, report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    most = _rows_triton.MAX_KL_BLOCK if kernel is kl_rows_kernel else _rows_triton.MAX_BLOCK
    assert registers * 32 * config_of(VOCAB, most).num_warps <= 65536, report
    assert metadata.shared <= 48 * 1024


@needs_ptxas
@pytest.mark.skipif(nvdisasm() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_blocks_of_a_row_are_on_their_way(dtype, tmp_path):
    """An H200 wants 29 kB on their way to a multiprocessor: see docs/performance.md."""
    constants = {"HAS_EPS": True, "HAS_GRADIENT": True, "HAS_CAP": False, "NARROW": False}
    compile_rows(log_rows_kernel, dtype, dtype, 90, constants, tmp_path)
    (loops,) = loops_of(tmp_path / "kernel.cubin").values()
    config = config_of(VOCAB)
    flying = max(loop.loads for loop in loops) * 16 * 32 * config.num_warps
    assert flying == 2 * config.BLOCK * dtype.itemsize
    assert flying >= 29_000


def test_one_configuration_per_vocabulary_size():
    assert config_of(128256) == (8192, 32)
    assert config_of(49152) == (8192, 32)
    assert config_of(100) == (128, 1)
    assert config_of(128256, _rows_triton.MAX_KL_BLOCK) == (4096, 16)
    assert _rows_triton.MAX_BLOCK == 8192
