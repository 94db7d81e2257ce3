"""Run by test_gram_triton.py under TRITON_INTERPRET=1: Gram and combine on ragged sizes."""

import pytest
import torch

from mollm_ops._gram_triton import combine_triton, gram_triton, serves
from mollm_ops.reference.gram import combine_reference, gram_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COUNTS = [0, 1, 127, 129, 2049, 7001]


def rows(K, count, dtype, missing):
    tensors = [torch.randn(count).to(dtype) for _ in range(K)]
    if missing and K > 1:
        tensors[1] = None
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("missing", [False, True])
def test_against_float64(K, count, dtype, missing):
    g = rows(K, count, dtype, missing)
    exact = gram_reference([[t] for t in g]) if count else torch.zeros(K, K).double()
    norms = exact.diagonal().clamp(min=1e-30).sqrt()
    error = (gram_triton(g) - exact) / (norms[:, None] * norms)
    assert float(error.abs().max()) <= (1e-13 if dtype == torch.float64 else 2e-7)
    w = torch.linspace(-1, 1, K, dtype=torch.float64)
    out = torch.full((count,), 7.0, dtype=dtype)
    combine_triton(g, w, out)
    (expected,) = combine_reference([[t] for t in g], w)
    # The interpreter truncates to bfloat16 where the hardware rounds.
    eps = 2 * torch.finfo(dtype).eps
    single = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out, expected, rtol=eps, atol=single)


@pytest.mark.parametrize("sizes", [(1e-25, 1e-25), (1e20, 1e20), (1e-25, 1e20, 1.0)], ids=str)
def test_any_size_that_a_float_has(sizes):
    g = [size * torch.randn(2049) for size in sizes]
    exact = gram_reference([[t] for t in g])
    norms = exact.diagonal().sqrt()
    error = (gram_triton(g) - exact) / (norms[:, None] * norms)
    assert float(error.abs().max()) <= 2e-7


def test_a_row_of_weight_zero_may_be_infinite():
    out = torch.empty(300)
    g = [torch.ones(300), torch.full((300,), float("inf"))]
    combine_triton(g, torch.tensor([2.0, 0.0], dtype=torch.float64), out)
    assert torch.equal(out, torch.full((300,), 2.0))


def test_what_is_left_to_plain_torch():
    assert serves([None, torch.ones(3)])
    assert not serves([torch.ones(3), torch.ones(3).half()])
    assert not serves([torch.ones(3)] * 9)
