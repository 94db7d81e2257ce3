"""The benchmarks run from end to end at small sizes and say where their figures come from."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import torch

from mollm.methods import METHODS, Method

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "gram_throughput.py --elements 100000",
    "step_time.py --elements 100000",
    "step_time.py --train --quick",
    "step_time.py --train --quick --preset smollm2-135m",
    "loss_throughput.py --quick --losses uce kl",
    "growth.py --quick --curves vocabulary tensors",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_writes_its_rows_and_their_provenance(command, tmp_path):
    path = tmp_path / "rows.json"
    script, *options = command.split()
    words = (ROOT / "benchmarks" / script, *options, "--rounds", "1", "--device", "cpu")
    launch.succeeds(*words, "--json", path, seconds=200)
    written = json.loads(path.read_text())
    assert {"device", "date", "versions", "commit", "command", "rows"} <= set(written)
    assert str(tmp_path) not in path.read_text()
    ours = [row for row in written["rows"] if row.get("method", "mollm") == "mollm"]
    assert ours
    assert all(row.get("error", 0) < 1e-2 for row in ours)
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("_common")


@pytest.fixture
def training_step(common):
    return importlib.import_module("_training_step")


def test_the_floor_of_a_training_step(training_step):
    cases = list(training_step.cases("cpu", quick=True))
    assert [case.settings.reference for case in cases] == ["copy", "cache", "copy", "adapter"]
    floors = [
        training_step.flops(case, "MOLLM") / training_step.flops(case, "weighted sum")
        for case in cases
    ]
    # What the layers alone would give; the head has as much to do on both sides.
    limits = [9 / 7, 8 / 6, 9 / 7, 6 / 5]
    assert all(0.95 * limit < floor < limit for floor, limit in zip(floors, limits, strict=True))
    held = training_step.flops(cases[0], "MOLLM")
    # Two layers, of which the second sweep computes one.
    assert 0.95 * 15 / 9 < training_step.flops(cases[0], "streamed") / held < 15 / 9
    assert 0.95 * 11 / 9 < training_step.flops(cases[0], "blocks") / held < 11 / 9


def test_the_training_steps_that_are_compared_walk_alike(training_step, monkeypatch):
    """Where ours only adds up its gradients; without KL the cosine of the changes is 0.986."""
    added = Method("added", METHODS["graddiff"].forget_loss, "sum", (1.0, 20.0, 1.0))
    monkeypatch.setattr(training_step, "METHOD", added)
    monkeypatch.setattr(training_step, "LR", 1e-3)
    case = next(iter(training_step.cases("cpu", quick=True)))
    changes = []
    for name in ("weighted sum", "MOLLM", "streamed"):
        with training_step.prepared(case, "cpu") as steps:
            params = [p for p in steps[name].objectives.model.parameters() if p.requires_grad]
            before = [p.detach().clone() for p in params]
            for _ in range(3):
                steps[name]()
            changed = [(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)]
            changes.append(torch.cat(changed))
    assert torch.cosine_similarity(*changes[:2], dim=0) > 0.999
    assert torch.equal(*changes[1:])


def test_what_runs_out_of_memory_is_told_and_loses_nothing_else(common, tmp_path):
    def fails():
        raise torch.cuda.OutOfMemoryError

    calls = {"fails": fails, "works": lambda: None}
    seconds = common.interleaved_medians(calls, "cpu", rounds=3)
    assert math.isnan(seconds["fails"])
    assert seconds["works"] >= 0
    rows = common.rows_or_none(fails, {"K": 4})
    assert rows == [{"K": 4, "out of memory": "the inputs"}]
    common.save_json(tmp_path / "rows.json", {}, [*rows, seconds])
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][1]["fails"] == "nan"


@pytest.mark.parametrize(("free", "expected"), [(80 * 10**9, 6 * 10**8), (10**13, 10**9)])
def test_the_default_size_fits_into_free_memory(common, monkeypatch, free, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    assert common.elements_that_fit("cuda", 23 * 4) == expected


def test_a_machine_without_git(common, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.provenance("cpu")["commit"] == "unknown"


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


def test_a_peer_that_fails_is_a_row_and_not_the_end(common):
    def fails():
        raise ValueError("no such kernel\nmore words")

    reasons = {}
    calls = {"ours": lambda: None, "theirs": fails}
    seconds = common.interleaved_medians(calls, "cpu", peers=["theirs"], reasons=reasons)
    assert reasons == {"theirs": "ValueError: no such kernel"}
    assert math.isnan(seconds["theirs"])
    with pytest.raises(ValueError, match="no such kernel"):
        common.interleaved_medians({"ours": fails}, "cpu", peers=["theirs"])


def test_the_bytes_of_a_step_are_those_it_reads_and_writes(common):
    step_time = importlib.import_module("step_time")
    P, K = 1000, 3
    gradients = [[torch.randn(P)] for _ in range(K)]
    counted = {}
    for name, mode in step_time.MODES.items():
        step = step_time.PreparedStep([torch.nn.Parameter(torch.zeros(P))], gradients, **mode)
        step()
        counted[name] = step.bytes_moved() / (4 * P)
    assert counted == {
        "AdamW, Adam's metric": 2 * K + 5,  # θ and v in and out, v once more
        "AdamW, Adam's metric, no tracking": 2 * K + 5,
        "AdamW, Adam's metric, momentum per objective": 5 * K + 5,
        "AdamW, Euclidean metric": 2 * K + 6,
        "AdamW, Euclidean metric, momentum per objective": 5 * K + 4,
        "SGD with momentum": 2 * K + 4,
    }


@pytest.mark.soak
@pytest.mark.parametrize("command", ["first", "rest"])
def test_a_dry_run_of_the_gpu_script(command, tmp_path, common, monkeypatch):
    """The same parts on a CPU at tiny sizes; the archive becomes results and tables."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "RESULTS": str(tmp_path / "out"),
        "MOLLM_GPU_DRY": "1",
        "MOLLM_COMMIT": "0123456789ab",
    }
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), command]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    again = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    parts = done.stdout.count("== ")
    assert again.stdout.count("done before") == parts == {"first": 8, "rest": 5}[command]
    gpu_results = importlib.import_module("gpu_results")
    tables = gpu_results.take_over(tmp_path / "out" / "gpu.tar.gz", tmp_path / "results")
    assert "commit 0123456789ab" in tables
    assert "| " in tables
    (folder,) = (tmp_path / "results").iterdir()
    assert sorted(p.stem for p in folder.glob("*.json")) == sorted(
        p.stem for p in (tmp_path / "out").glob("*.json")
    )


def test_the_first_command_fits_into_ten_minutes():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    first, rest = script.split("\n  first)")[1].split("\n  rest)")
    limits = re.findall(r"^    (?:part|benchmark) \w+ (\d+)", first, flags=re.M)
    assert len(limits) == 8
    assert sum(map(int, limits)) <= 580
    assert len(re.findall(r"^    (?:part|benchmark) ", rest, flags=re.M)) == 6
