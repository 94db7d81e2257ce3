"""The study: its score, its run file, and a quick run of synthetic facts from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality.runs import RunFile, method_of  # noqa: E402
from quality.summary import hypervolume, of_methods  # noqa: E402


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(0, 1)], 0),
        ([(0, 1), (1, 1)], 1),
        ([(0.5, 1), (1, 0.5)], 0.75),
        ([(0.5, 1), (1, 0.5), (0.4, 0.4)], 0.75),
        ([(1, 0), (0.25, 0.5)], 0.125),
    ],
)
def test_the_hypervolume_is_the_area_of_the_union(points, area):
    assert hypervolume(points) == pytest.approx(area)
    assert hypervolume(points[::-1]) == pytest.approx(area)


def run(method, lr, seed, forget):
    curve = [{"forget": 1.0, "heldout": 1.0}, {"forget": forget, "heldout": 1.0}]
    return {"task": "t", "method": method, "lr": lr, "seed": seed, "steps": 1, "curve": curve}


def test_the_best_learning_rate_is_that_of_the_highest_mean():
    rows = [run("a", 1, 0, 0.5), run("a", 1, 1, 0.5), run("a", 2, 0, 0.1), run("a", 2, 1, 0.7)]
    assert [row["lr"] for row in of_methods(rows, "t")["a"]] == [2, 2]
    assert len(of_methods(rows[:3], "t")["a"]) == 1


def test_a_run_file_survives_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunFile(path).add(run("a", 1, 0, 0.5))
    path.write_text(path.read_text() + '{"task": "t", "met')
    file = RunFile(path)
    assert file.has(run("a", 1, 0, 0.9))
    assert not file.has(run("a", 1, 1, 0.5))


def test_variants_of_a_method():
    assert method_of("upgrad-unit+adam").options == {"normalize": True, "metric": "base"}
    with pytest.raises(ValueError, match="variant must be one of adam, momentum, but got 'x'"):
        method_of("dual+x")


def test_a_quick_study_of_facts(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "unlearning_quality.py"), "--quick"]
    command += ["--tasks", "facts-2", "--seeds", "0", "1", "--methods", "ga", "sum", "dual"]
    command += ["--folder", str(tmp_path), "--checks", "conflicts", "gap"]

    def study():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "quick.jsonl").read_text()

    lines = study()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 6
    for row in runs:
        assert row["original"]["forget"] > 0.95
        assert row["curve"][-1]["forget"] < 0.9
    assert study() == lines
    written = json.loads((tmp_path / "unlearning_quality.json").read_text())
    methods = {row["method"]: row for row in written["rows"] if "method" in row}
    assert set(methods) == {"ga", "sum", "dual"}
    assert methods["dual"]["direction conflicts"] == 0
    text = (tmp_path / "study.md").read_text()
    assert "| sum |" in text
    assert (tmp_path / "figures" / "facts-2.png").stat().st_size > 10_000
