"""Tables for the terminal and for notebooks."""

from __future__ import annotations

import html
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


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", left: int = 1
) -> str:
    """The rows as a table for a notebook; whatever is in a cell shows as the text that it is.

    Args:
        header: Of the columns.
        rows: Cells; one alone is the heading of the rows that follow.
        caption: Shown below the table.
        left: How many columns begin at the left of their cells.

    Example:
        >>> html_table(("loss", "last"), [("forget", "0.08")]).count("<tr>")
        2
    """

    def line(cells: Sequence[str], tag: str) -> str:
        if len(cells) == 1:
            made = (
                f'<th colspan="{len(header)}" style="text-align:left">{html.escape(cells[0])}</th>'
            )
            return f"<tr>{made}</tr>"
        sides = ("left" if place < left else "right" for place in range(len(cells)))
        made = "".join(
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{made}</tr>"

    body = "".join(line(row, "td") for row in rows)
    below = f"<div>{html.escape(caption)}</div>" if caption else ""
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>{below}"
