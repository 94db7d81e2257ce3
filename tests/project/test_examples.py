"""Every example runs as a script, alone or in two processes, and all make the same steps."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest
import tiny

IN_FLOAT32 = Path(__file__).resolve().parents[1] / "in_float32.py"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


def run(*command):
    """The weights of the combined gradient at every step, as the example prints them.

    In float32: the rounding of bfloat16 products depends on how the rows are cut into batches.
    """
    out, err, code = launch.python(*command, "--lr", "1e-3", seconds=90)
    assert code in (0, None), err[-3000:]
    printed = re.findall(r"status=\w+.*?weights=\[(.*?)\]", out)
    return [[float(w) for w in step.split(",")] for step in printed]


@pytest.fixture(scope="module")
def alone():
    return run(IN_FLOAT32, EXAMPLES / "plain.py")


def test_the_plain_loop_alone(alone):
    assert len(alone) == 3
    assert alone[0][1] == 0  # KL has no gradient where the model is its original
    assert all(kl > 0 for _, kl, _ in alone[1:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_make_the_steps_of_one(script, alone):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    steps = run(*torchrun, IN_FLOAT32, EXAMPLES / script)
    assert len(steps) == 3
    for step, expected in zip(steps, alone, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


def test_a_model_from_a_folder(tmp_path, alone):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    steps = run(IN_FLOAT32, EXAMPLES / "plain.py", "--model", str(tmp_path), "--steps", "1")
    assert len(steps) == 1
    assert steps[0] != pytest.approx(alone[0], rel=1e-2)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_60_lines(path):
    assert len(path.read_text().splitlines()) <= 60
