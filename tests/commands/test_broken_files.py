import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "broken_files.py"


def tried(*arguments, timeout):
    """Runs the cases in a process of its own: it forks, and no thread of a test may be there."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=SCRIPT.parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_some_broken_inputs_end_in_one_sentence():
    assert " tried, 0 wrong" in tried("0", "--every", "14", timeout=300)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_all_broken_inputs_end_in_one_sentence(seed):
    assert " tried, 0 wrong" in tried(str(seed), timeout=3600)
