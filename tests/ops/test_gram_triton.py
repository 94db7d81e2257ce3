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


@needs_ptxas
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", SHORT.values())
@pytest.mark.parametrize("K", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", [gram_kernel, combine_kernel], ids=lambda k: k.__name__)
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
