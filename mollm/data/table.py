"""The rows of a data set as they were read, each with its place, before their schema is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mollm.errors import UsageError

Unit = Literal["line", "row"]
Rows = list[tuple[int, dict[str, Any]]]
"""Rows, each with its number."""


@dataclass(frozen=True)
class Table:
    """The rows of a data set, at least one, each with its number."""

    name: str
    """The file, the folder or the name on the hub, with the config and the split where given."""
    unit: Unit
    """What a number counts, from 1: lines of a text file, or rows."""
    columns: tuple[str, ...]
    rows: Iterable[tuple[int, Mapping[str, Any]]]


def table(name: str, unit: Unit, rows: Rows) -> Table:
    """A table whose columns are those of any row.

    Raises:
        UsageError: There is no row.
    """
    if not rows:
        raise UsageError(f"{name} must hold at least one row, but it holds none.")
    columns = dict.fromkeys(column for _, row in rows for column in row)
    return Table(name, unit, tuple(columns), rows)


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long, for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Names for an error message, the first of many."""
    found = [str(name) for name in names]
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest or "none"
