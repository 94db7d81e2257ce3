"""Triton's Gram and combine without a GPU: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from ahead_of_time import needs_interpreter, needs_ptxas, run_interpreted  # noqa: E402
from device_code import SHORT, compiled_triton, load_widths, nvdisasm  # noqa: E402
from triton import language as tl  # noqa: E402

from mollm_ops._gram_triton import block_of, combine_kernel, gram_kernel  # noqa: E402


@needs_interpreter
def test_interpreted():
    run_interpreted("interpreted_gram.py")


EVERY = [
    # Of other targets than the H100's by default those with the most rows.
    pytest.param(
        kernel,
        K,
        dtype,
        capability,
        id=f"{kernel.__name__}-{K}-{dtype}-{capability}",
        marks=() if capability == 90 or K == 8 else pytest.mark.soak,
    )
    for kernel in (gram_kernel, combine_kernel)
    for K in (1, 2, 3, 8)
    for dtype in SHORT.values()
    for capability in (90, 80, 100)
]


@needs_ptxas
@pytest.mark.parametrize(("kernel", "K", "dtype", "capability"), EVERY)
def test_compiles_without_spills(kernel, K, dtype, capability, tmp_path):
    rows = triton.next_power_of_2(K)
    constants = {
        "K": K,
        "ROWS": rows,
        "ALIGNED": True,
        "BLOCK": block_of(rows),
        "EXACT": tl.float32,
    }
    types = {"table": "*i64", "like": f"*{dtype}", "out": f"*{dtype}", "count": "i64"}
    types |= {"weights": "*fp64", "partials": "*fp64"}
    aligned = ("table", "like", "out", "weights", "partials", "count")
    code, _ = compiled_triton(kernel, types, constants, aligned, capability, 4, tmp_path)
    assert code.spilled == 0
    if capability == 90 and nvdisasm():
        widths = load_widths(tmp_path / "kernel.cubin")
        assert "128" in widths
        assert "U16" not in widths
