"""Which rows of a data set are meant: by a filter, and by labels of safety."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mollm.data.table import Table, listed, shown
from mollm.errors import UsageError

_FLAG = "is_safe"
_LABEL = "label"
_SAFE = ("safe", "harmless", "benign", "acceptable")
_UNSAFE = ("unsafe", "harmful", "toxic")
_VALUES = 6
"""The most values that a message names."""


def where_of(table: Table, where: Any) -> Table:
    """The rows of which the columns have the values asked for.

    Args:
        table: All rows.
        where: A value, or a list of several, for each column; one within an object is named by its
            path, such as category.animal_abuse. None or nothing for all rows.

    Raises:
        UsageError: It is no such mapping, a column is none, or no row is left.
    """
    if not where and (where is None or isinstance(where, Mapping)):
        return table
    if not isinstance(where, Mapping):
        raise UsageError(
            "where must give values by the names of columns, such as {is_safe: false}, but got "
            f"{shown(where)}."
        )
    for name in where:
        if name not in table.columns and str(name).split(".")[0] not in table.columns:
            raise UsageError(
                f"where must name columns of {table.name}, which are {listed(table.columns)}, but "
                f"got {name!r}."
            )
    kept = [(n, row) for n, row in table.rows if _fits(row, where)]
    if not kept:
        raise UsageError(
            f"{table.name} must have rows where {shown(dict(where))}, but has none: look at the "
            "values of these columns."
        )
    return Table(table.name, table.unit, table.columns, kept)


def labelled(table: Table, role: str, where: Mapping[str, Any] | None) -> Table:
    """The rows that labels of safety leave to a role: unsafe ones to forget, safe ones to retain.

    The labels are those of a column is_safe, as BeaverTails has it, or label. A filter that names
    the column, or an empty one, which takes all rows, takes their place.

    Raises:
        UsageError: The labels do not say which rows are safe, or none is left for the role.
    """
    column = next((name for name in (_FLAG, _LABEL) if name in table.columns), None)
    if column is None or (where is not None and (not where or column in where)):
        return table
    rows = list(table.rows)
    values = list({shown(row.get(column)): row.get(column) for _, row in rows}.values())
    safe = [_is_safe(column, value) for value in values]
    if None in safe:
        if len(values) == 1:
            return Table(table.name, table.unit, table.columns, rows)
        raise UsageError(
            f"{table.name} has the column {column} with the values "
            f"{listed(map(shown, values), _VALUES)}, which do not say which rows to {role}: choose "
            f"them with where, such as {_asked(column, values[0])}, or take all with "
            "where: {}."
        )
    wanted = role == "retain"
    kept = [(n, row) for n, row in rows if _is_safe(column, row.get(column)) is wanted]
    if not kept:
        raise UsageError(
            f"{table.name} must hold a row that its column {column} calls "
            f"{'safe' if wanted else 'unsafe'} for the role {role}, but holds none: take all rows "
            "with where: {}."
        )
    return Table(table.name, table.unit, table.columns, kept)


def _asked(column: str, value: Any) -> str:
    return f"where: {{{column}: {shown(value)}}}"


def _is_safe(column: str, value: Any) -> bool | None:
    """What a label says; None where that is not clear."""
    if column == _FLAG and (isinstance(value, bool) or value in (0, 1)):
        return bool(value)
    word = str(value).strip().lower() if isinstance(value, str) else ""
    if column == _FLAG and word in ("true", "false", "0", "1"):
        return word in ("true", "1")
    if word in _SAFE or word in _UNSAFE:
        return word in _SAFE
    return None


def _fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        any(_same(_at(row, str(name)), one) for one in _listed(wanted))
        for name, wanted in where.items()
    )


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else [wanted]


def _at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of one within an object."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _same(value: Any, wanted: Any) -> bool:
    """Whether a value is the one wanted; one of a .csv file is as it is written there."""
    if isinstance(value, str) and not isinstance(wanted, str):
        return value.strip().lower() == json.dumps(wanted).lower()
    return isinstance(value, bool) is isinstance(wanted, bool) and bool(value == wanted)
