"""Triton kernels on a machine without a GPU: compiled for a target, or interpreted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run_interpreted(name):
    """In a process of its own: whether a kernel is interpreted is decided when it is defined."""
    file = Path(__file__).with_name(name)
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


needs_ptxas = pytest.mark.skipif(
    ptxas() is None, reason="needs ptxas, which neither Triton nor PATH has"
)


def compile_kernel(kernel, types, constants, aligned, capability, warps, tmp_path, registers=None):
    """ptxas's report and Triton's metadata of one kernel.

    Args:
        types: The type of every argument that is not in `constants`.
        aligned: Arguments that are divisible by 16.
        registers: What a thread may have; None for what the compiler takes.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": warps, "maxnreg": registers}
    )
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    arch = re.search(r"\.target (\S+?)(,|\s)", compiled.asm["ptx"])[1]
    command = [ptxas(), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, compiled.metadata


def spills(report):
    """Bytes of registers that a kernel spills."""
    found = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert found, report
    return sum(found)
