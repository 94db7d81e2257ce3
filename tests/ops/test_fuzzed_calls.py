"""Calls of the public functions with arguments of every kind, see tests/fuzzed_calls.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def tried(*arguments, timeout):
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzzed_calls.py"), *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=TESTS.parent, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_thousand_calls_crash_nothing_and_are_right_or_refused():
    assert "1000 tried, 0 wrong" in tried("0", "--calls", "1000", timeout=300)


@pytest.mark.soak
def test_a_hundred_thousand_calls_crash_nothing_and_are_right_or_refused():
    told = tried("1", "--calls", "100000", timeout=7200)
    print(told)
    assert ", 0 wrong" in told
