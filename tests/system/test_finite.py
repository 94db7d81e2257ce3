import pytest
import torch

from mollm.system.finite import all_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 100_003])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_is_found_wherever_it_is(value, count, dtype):
    elements = torch.randn(count).to(dtype)
    assert all_finite(elements)
    for place in (0, count // 2, count - 1):
        broken = elements.clone()
        broken[place] = value
        assert not all_finite(broken)
        assert not all_finite(broken.expand(2, count).t())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_eight_bits(dtype):
    elements = torch.randn(7).to(dtype)
    assert all_finite(elements)
    elements[3] = torch.nan
    assert not all_finite(elements)


def test_the_largest_numbers_are_finite_and_nothing_is():
    assert all_finite(torch.tensor([torch.finfo(torch.float32).max] * 3))
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor(2.0, requires_grad=True))
    assert all_finite(torch.arange(3))
    assert all_finite(torch.tensor([1 + 2j]))
    assert not all_finite(torch.tensor([complex(1, float("nan"))]))
