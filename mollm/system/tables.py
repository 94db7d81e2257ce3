"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest


def aligned(rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The rows as lines: columns as wide as their longest cell, two spaces apart.

    Args:
        rows: Cells; a row may be shorter than others.
        left: How many columns begin at the left of their cells, where texts do; numbers end at the
            right.

    Example:
        >>> print("\\n".join(aligned([("loss", "first", "last"), ("forget", "2.41", "0.08")])))
        loss    first  last
        forget   2.41  0.08
    """
    listed = list(rows)
    widths = [max(map(len, column)) for column in zip_longest(*listed, fillvalue="")]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in listed
    ]
