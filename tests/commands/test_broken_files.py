from pathlib import Path

import launch
import pytest

TESTS = Path(__file__).parents[1]


def tried(script, *arguments, seconds):
    """Runs the cases in a process of its own: it forks, and no thread of a test may be there."""
    return launch.succeeds(TESTS / script, *arguments, seconds=seconds)


def test_some_broken_inputs_end_in_one_sentence():
    assert " tried, 0 wrong" in tried("broken_files.py", "0", "--every", "29", seconds=300)


def test_some_hostile_files_end_in_one_sentence():
    assert " tried, 0 wrong" in tried("hostile_files.py", "0", "--every", "107", seconds=300)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("script", ["broken_files.py", "hostile_files.py"])
def test_all_broken_inputs_end_in_one_sentence(script, seed):
    assert " tried, 0 wrong" in tried(script, seed, seconds=3600)
