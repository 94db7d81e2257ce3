"""The benchmarks run from end to end at small sizes and say where their figures come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "gram_throughput.py": ["--elements", "100000", "--rounds", "1"],
    "step_time.py": ["--elements", "100000", "--rounds", "1"],
    "loss_throughput.py": ["--quick", "--rounds", "1", "--losses", "uce", "kl"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_benchmark_writes_its_rows_and_their_provenance(script, tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *COMMANDS[script]]
    command += ["--device", "cpu", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert {"device", "date", "versions", "commit", "command", "rows"} <= set(written)
    ours = [row for row in written["rows"] if row.get("method", "mollm") == "mollm"]
    assert ours
    assert all(row.get("error", 0) < 1e-2 for row in ours)
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script would run for minutes")
def test_the_gpu_script_stops_at_once_without_a_device(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    environment.pop("CUDAARCHS", None)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())
