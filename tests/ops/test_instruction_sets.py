"""The kernels of every instruction set that this processor has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import launch
import pytest

from mollm_ops._extension import extension

SCRIPT = Path(__file__).resolve().parents[1] / "instruction_set.py"
SETS = ("baseline", "avx2", "avx512", "avx512bf16")
LIMITS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "avx512bf16": ""}


@pytest.mark.parametrize(
    "name", [n if n == "avx2" else pytest.param(n, marks=pytest.mark.soak) for n in SETS]
)
def test_all_kernels_agree_with_float64(name, monkeypatch):
    best = extension.cpu_instruction_set()
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("ATEN_CPU_CAPABILITY is set, and chooses one set for the whole run")
    if SETS.index(name) > SETS.index(best):
        pytest.skip(f"this processor has no more than {best}")
    if LIMITS[name]:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", LIMITS[name])
    out, err, status = launch.python(str(SCRIPT), seconds=300)
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["instruction set"] == name
    wrong = {what: error for what, error in told["errors"].items() if not error <= 1}
    assert not wrong
