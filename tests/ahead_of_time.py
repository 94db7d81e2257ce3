"""Triton kernels on a machine without a GPU: compiled for a target, or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from device_code import ptxas

needs_ptxas = pytest.mark.skipif(
    ptxas() is None, reason="needs ptxas, which neither Triton nor PATH has"
)
needs_interpreter = pytest.mark.skipif(
    triton.__version__.startswith("3.6.")
    and tuple(map(int, np.__version__.split(".")[:2])) > (2, 2),
    reason=f"Triton 3.6's interpreter needs NumPy 2.2 or older, and this is {np.__version__}",
)


def run_interpreted(name):
    """In a process of its own: whether a kernel is interpreted is decided when it is defined."""
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
