"""The CUDA sources compile for every shipped architecture, on a machine without a GPU too, into
kernels that read as much at a time as a device's memory wants."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from device_code import NVCC, compiled, nvdisasm

pytestmark = pytest.mark.skipif(
    NVCC is None or nvdisasm() is None, reason="needs nvcc on PATH and nvdisasm"
)

SOURCES = ["gram_cuda.cu", "update_cuda.cu"]
# One by default: each takes half a minute.
ARCHITECTURES = [
    "sm_90",
    pytest.param("sm_80", marks=pytest.mark.soak),
    pytest.param("sm_100", marks=pytest.mark.soak),
]


@functools.cache
def kernels(source, architecture):
    with tempfile.TemporaryDirectory() as folder:
        return {k.name: k for k in compiled(source, architecture, Path(folder))}


def moved_blocks(K, means):
    """csrc/gram_cuda.cu, moved_blocks_per_sm."""
    if means:
        return 2 if K <= 3 else 1
    return {1: 4, 2: 3, 3: 2, 4: 2}.get(K, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(source, architecture):
    found = kernels(source, architecture)
    assert len(found) >= 9
    assert {name: k.spilled for name, k in found.items() if k.spilled} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_gradient_is_on_its_way_before_the_first_is_waited_for(architecture):
    """Sixteen bytes a load; rows of float32 take two."""
    gram, update = (kernels(source, architecture) for source in SOURCES)
    for K in range(1, 9):
        for name, rows in ((f"gram_kernel<{K}>", K), (f"combine_kernel<{K}>", K)):
            narrow = [loop.loads for loop in gram[name].loops if not loop.alternatives]
            assert len(narrow) == 3, name  # float32 and the two of 16 bits
            assert min(narrow) >= rows, (name, narrow)
            assert max(narrow) >= 2 * rows, (name, narrow)
        for means in (False, True):
            (loop,) = gram[f"gram_moved_kernel<{K},{str(means).lower()}>"].loops
            assert loop.loads == 2 * ((2 if means else 1) * K + 1)
    for K in range(1, 10):
        (loop,) = update[f"update_kernel<{K}>"].loops
        assert loop.loads == 2 * (2 * K + 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_that_a_grid_counts_on_fit_at_once(architecture):
    gram = kernels("gram_cuda.cu", architecture)
    for K in range(1, 9):
        for means in (False, True):
            name = f"gram_moved_kernel<{K},{str(means).lower()}>"
            assert gram[name].blocks >= moved_blocks(K, means), name
        if K <= 6:  # more take turns
            assert gram[f"gram_kernel<{K}>"].blocks >= (4 if K <= 3 else 2)
        assert gram[f"combine_kernel<{K}>"].blocks >= (4 if K <= 3 else 2)
