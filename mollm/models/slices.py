"""Rows of a large matrix that a step works on in place of the matrix, a few at a time."""

from __future__ import annotations

from torch import Tensor

_ROWS = "_mollm_rows"


def rows_of(matrix: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin … end of a parameter, in its memory, as a parameter of their own."""
    rows = matrix.detach()[begin:end]
    setattr(rows, _ROWS, (matrix, begin, end))
    return rows


def whole_of(p: Tensor) -> Tensor:
    """The parameter that `p` is some rows of, or is."""
    matrix: Tensor = getattr(p, _ROWS, (p,))[0]
    return matrix


def span_of_rows(p: Tensor) -> tuple[int, int] | None:
    """Which rows of a parameter `p` is; None for all."""
    found: tuple[Tensor, int, int] | None = getattr(p, _ROWS, None)
    return None if found is None else found[1:]


def same_rows(t: Tensor, p: Tensor) -> Tensor:
    """The rows of `t`, which has the shape of the whole parameter, that `p` is."""
    span = span_of_rows(p)
    return t if span is None else t[span[0] : span[1]]
