"""The Triton kernels without a GPU: interpreted against float64, compiled for every target."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mollm_ops import _rows_triton  # noqa: E402
from mollm_ops._rows_triton import config_of, kl_rows_kernel, log_rows_kernel  # noqa: E402

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VOCAB = 128256


def test_interpreted():
    """In a process of its own: whether a kernel is interpreted is decided when it is defined."""
    file = Path(__file__).with_name("interpreted_rows.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def ptxas() -> str | None:
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin"
    # The architectures from sm_100 have an assembler of their own in some releases.
    found = [
        str(p) for name in ("ptxas-blackwell", "ptxas") for p in [bundled / name] if p.exists()
    ]
    return (found or [shutil.which("ptxas")])[0]


def compile_rows(kernel, dtype, gradient, capability, constants, tmp_path):
    """ptxas's report of one kernel at the vocabulary of Llama 3, all strides divisible by 16."""
    config = config_of(VOCAB)
    constants = {**constants, "BLOCK": config.BLOCK}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("logits", "ref_logits"):
            signature[name] = f"*{SHORT[dtype]}"
        elif name.endswith("gradient"):
            signature[name] = f"*{SHORT[gradient]}"
        elif name == "target":
            signature[name] = "*i64"
        elif name.endswith(("losses", "scale")):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name not in constants and name not in ("eps", "R") and "scale_stride" not in name:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": config.num_warps})
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    arch = re.search(r"\.target (\S+?)(,|\s)", compiled.asm["ptx"])[1]
    command = [ptxas(), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, compiled.metadata


FLAGS = list(itertools.product([False, True], repeat=2))
LOG = [
    (log_rows_kernel, dtype, dtype, {"HAS_EPS": eps, "HAS_GRADIENT": gradient})
    for dtype in SHORT
    for eps, gradient in FLAGS
]
KL = [
    (
        kl_rows_kernel,
        torch.float32,
        gradient,
        {
            "HAS_CE": ce,
            "HAS_KL_GRADIENT": wanted,
            "HAS_CE_GRADIENT": ce and wanted,
            "NARROW": gradient != torch.float32,
        },
    )
    for gradient in SHORT
    for ce, wanted in FLAGS
]


@pytest.mark.skipif(ptxas() is None, reason="needs ptxas, which neither Triton nor PATH has")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "dtype", "gradient", "constants"), LOG + KL)
def test_compiles_without_spills(kernel, dtype, gradient, constants, capability, tmp_path):
    report, metadata = compile_rows(kernel, dtype, gradient, capability, constants, tmp_path)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert spills, report
    assert not any(spills), report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers * 32 * config_of(VOCAB).num_warps <= 65536, report
    assert metadata.shared <= 48 * 1024


def test_one_configuration_per_vocabulary_size():
    assert config_of(128256) == (8192, 16)
    assert config_of(49152) == (8192, 16)
    assert config_of(100) == (128, 1)
    assert _rows_triton.MAX_BLOCK == 8192
