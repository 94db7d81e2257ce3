"""Calls of the public functions with arguments of every kind, see tests/fuzzed_calls.py."""

from pathlib import Path

import launch
import pytest

SCRIPT = Path(__file__).parents[1] / "fuzzed_calls.py"


def test_a_thousand_calls_crash_nothing_and_are_right_or_refused():
    assert "1000 tried, 0 wrong" in launch.succeeds(SCRIPT, 0, "--calls", 1000, seconds=300)


@pytest.mark.soak
def test_a_hundred_thousand_calls_crash_nothing_and_are_right_or_refused():
    told = launch.succeeds(SCRIPT, 1, "--calls", 100000, seconds=7200)
    print(told)
    assert ", 0 wrong" in told
