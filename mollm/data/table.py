"""The rows of a data set as they were read, each with its place, before their schema is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mollm.errors import UsageError

Unit = Literal["line", "row"]
Rows = list[tuple[int, dict[str, Any]]]
"""Rows, each with its number."""
_NOTHING = ("", "[]", "{}", "null")
"""Texts that say nothing; the last three as JSON."""


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


def is_missing(value: Any) -> bool:
    """Whether there is no value: None, or NaN, as tables of numbers write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a value says nothing.

    That is None, NaN, False and 0, blank text, JSON of nothing, an empty list, and a mapping whose
    values are all so, as data sets write that one of several fields is not used.

    Example:
        >>> [is_empty(value) for value in (" ", "[]", {"name": None}, "none", [0])]
        [True, True, True, False, False]
    """
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, str):
        return value.strip() in _NOTHING
    return is_missing(value) or not value


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long, for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Names for an error message, the first of many."""
    found = [str(name) for name in names]
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest or "none"
