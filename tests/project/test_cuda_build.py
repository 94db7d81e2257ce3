"""The CUDA sources compile for every shipped architecture, on a machine without a GPU too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which is not on PATH")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
def test_compiles_without_spills(source, architecture, tmp_path):
    command = [
        NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DMOLLM_WITH_CUDA=1",
        f"-arch={architecture}", "-Xptxas=-v", "-c", str(ROOT / "csrc" / source),
        "-o", str(tmp_path / "kernels.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    assert spills, "ptxas reported no kernel"
    assert not any(spills), done.stderr
