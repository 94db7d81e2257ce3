"""Parameter groups: which parameters one metric serves, and how fast each group moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mollm.models.slices import whole_of
from mollm_ops.operands import RunningMeans


def columns_of(
    lists: Sequence[Sequence[Tensor | None]], columns: Sequence[int]
) -> list[list[Tensor | None]]:
    """Those columns of every list."""
    return [[row[n] for n in columns] for row in lists]


def columns_of_means(moving: RunningMeans | None, columns: Sequence[int]) -> RunningMeans | None:
    """Those columns of the running means."""
    return moving and RunningMeans(columns_of(moving.means, columns), moving.beta)


def slices_of(params: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """The columns of `params` in turn, as many at a time as have up to `size` elements."""
    columns: list[int] = []
    elements = 0
    for n, p in enumerate(params):
        if columns and elements + p.numel() > size:
            yield columns
            columns, elements = [], 0
        columns.append(n)
        elements += p.numel()
    if columns:
        yield columns


def relative_rates(groups: Sequence[dict[str, Any]]) -> list[float | Tensor]:
    """Each group's learning rate by the largest of all; 1 for all of them where that is 0.

    A rate on a GPU is left there.
    """
    rates = [group.get("lr", 1.0) for group in groups]
    first = rates[0]
    if all(rate is first for rate in rates):
        return [1.0] * len(rates)
    on_device = [rate for rate in rates if isinstance(rate, Tensor) and rate.is_cuda]
    if not on_device:
        numbers = [float(rate) for rate in rates]
        most = max(numbers)
        return [number / most if most > 0 else 1.0 for number in numbers]
    every = torch.stack([torch.as_tensor(rate).to(on_device[0].device) for rate in rates]).double()
    top = every.max()
    return list(torch.where(top > 0, every / top, 1.0).reshape(-1).unbind())


def alike(
    params: Sequence[Tensor],
    groups: Sequence[dict[str, Any]],
    options: Callable[[dict[str, Any]], tuple[Any, ...]],
) -> list[tuple[float | Tensor, dict[str, Any], list[int]]]:
    """The columns of `params` by what their Gram matrix depends on.

    Args:
        options: what parameters must share, besides the learning rate.

    Returns:
        For each set of columns their relative learning rate and a group with their options.
    """
    of = {id(whole_of(p)): n for n, group in enumerate(groups) for p in group["params"]}
    rates = relative_rates(groups)
    keys = [
        (id(rate) if isinstance(rate, Tensor) else rate, *options(group))
        for rate, group in zip(rates, groups, strict=True)
    ]
    found: dict[tuple[Any, ...], tuple[float | Tensor, dict[str, Any], list[int]]] = {}
    for column, p in enumerate(params):
        number = of[id(whole_of(p))]
        found.setdefault(keys[number], (rates[number], groups[number], []))[2].append(column)
    return list(found.values())
