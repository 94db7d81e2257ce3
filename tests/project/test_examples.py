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


def steps_of(out, err, code):
    """The weights of the combined gradient at every step, as the example prints them.

    In float32: the rounding of bfloat16 products depends on how the rows are cut into batches.
    """
    assert code in (0, None), err[-3000:]  # gloo does not always let go of its process group
    printed = re.findall(r"status=\w+.*?weights=\[(.*?)\]", out)
    return [[float(w) for w in step.split(",")] for step in printed]


def run(script, *options, world=1):
    words = (IN_FLOAT32, EXAMPLES / script, "--lr", "1e-3", *options)
    return steps_of(*launch.script(*words, world=world, seconds=40))


@pytest.fixture(scope="module")
def alone():
    return run("plain.py")


def test_the_plain_loop_alone(alone):
    assert len(alone) == 3
    assert alone[0][1] == 0  # KL has no gradient where the model is its original
    assert all(kl > 0 for _, kl, _ in alone[1:])


def agree(steps, expected):
    assert len(steps) == 3
    for step, of_one in zip(steps, expected, strict=True):
        assert step == pytest.approx(of_one, rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_make_the_steps_of_one(script, alone):
    agree(run(script, world=2), alone)


def test_torchrun_starts_an_example(alone):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = (*torchrun, IN_FLOAT32, EXAMPLES / "plain.py", "--lr", "1e-3")
    agree(steps_of(*launch.python(*words, seconds=90)), alone)


def test_a_model_from_a_folder(tmp_path, alone):
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    steps = run("plain.py", "--model", tmp_path / "tiny", "--steps", "1")
    assert len(steps) == 1
    assert steps[0] != pytest.approx(alone[0], rel=1e-2)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_60_lines(path):
    assert len(path.read_text().splitlines()) <= 60
