"""Readers of single files of rows.

Files are read here and not by the package `datasets`, which guesses types: of the answers "42",
"NA" and "2020-01-01" in a text file it makes a number, a null and a date. It also does not say
which line is malformed, takes a bracket in a name for a pattern, and keeps a plain copy of private
data in its cache.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.data.table import Rows, Table, shown, table
from mollm.errors import UsageError
from mollm.system.parsing import check_file, parse_json, parse_json_lines, read_text, reason_of

if TYPE_CHECKING:
    import pyarrow

_BATCH = 256
_ROW_BYTES = 100
_UNPACKED_BYTES = 1 << 28
_UNPACKED_TIMES = 100


def _read_lines(path: Path) -> Table:
    rows = [
        (number, _object(row, f"{path}, line {number}"))
        for number, row in parse_json_lines(read_text(path, None), str(path))
    ]
    return table(str(path), "line", rows)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{place} must hold one JSON object, but got {shown(row)}.")
    return row


def _read_json(path: Path) -> Table:
    text = read_text(path, None)
    if not text.lstrip().startswith("["):  # many a .json file has an object on every line
        return _read_lines(path)
    rows = parse_json(text, str(path))
    numbered = [(i, _object(row, f"{path}, row {i}")) for i, row in enumerate(rows, 1)]
    return table(str(path), "row", numbered)


def _read_csv(path: Path) -> Table:
    with _cells_of_any_length():
        (_, header), *lines = [*_csv_lines(path)] or [(1, [])]
    if len(set(header)) < len(header):
        raise UsageError(
            f"{path} must have columns of different names, but got {', '.join(header)}."
        )
    rows = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise UsageError(
                f"{path}, line {number} must have {len(header)} cells like the header, but it "
                f"has {len(cells)}: put cells that hold a comma in double quotes."
            )
        rows.append((number, dict(zip(header, cells, strict=True))))
    return table(str(path), "line", rows)


@contextlib.contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """By default the module csv refuses a cell of more than 131072 characters."""
    before = csv.field_size_limit((1 << 31) - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line on which it begins."""
    reader = csv.reader(io.StringIO(read_text(path, None), newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, line {number} is malformed CSV: {error}.") from error
        if cells:
            yield number, cells


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    check_file(path)
    with refused_as_unreadable(path), pyarrow.parquet.ParquetFile(path) as file:
        rows = _unpacked(path, file.iter_batches(batch_size=_BATCH))
    return table(str(path), "row", rows)


def read_arrow(path: Path) -> Rows:
    """The rows of an Arrow stream, such as `save_to_disk` of the package `datasets` writes.

    Raises:
        UsageError: It cannot be read.
    """
    import pyarrow

    check_file(path)
    with refused_as_unreadable(path), pyarrow.OSFile(str(path)) as file:
        return _unpacked(path, pyarrow.ipc.open_stream(file))


@contextlib.contextmanager
def refused_as_unreadable(path: Path) -> Iterator[None]:
    """Makes whatever a reader raises about a file a sentence that names the file."""
    try:
        yield
    except (UsageError, ModuleNotFoundError):
        raise
    except Exception as error:  # of Arrow's many errors, some are ValueErrors and some are not
        raise UsageError(f"{path} cannot be read: {reason_of(error)}.") from error


def _unpacked(path: Path, batches: Iterable[pyarrow.RecordBatch]) -> Rows:
    """All rows; a small file that unpacks to gigabytes is refused before they fill the memory."""
    most = max(_UNPACKED_BYTES, _UNPACKED_TIMES * path.stat().st_size)
    rows: list[dict[str, Any]] = []
    size = 0
    for whole in batches:
        for start in range(0, whole.num_rows, _BATCH):
            batch = _plain(whole.slice(start, _BATCH))
            batch.validate(full=True)  # offsets of a damaged file point anywhere
            size += batch.nbytes + _ROW_BYTES * batch.num_rows
            if size > most:
                raise UsageError(
                    f"{path} must not unpack to more than {most:,} bytes, but it does: "
                    "write it again without so much compression, or as .jsonl."
                )
            rows += batch.to_pylist()
    return list(enumerate(rows, 1))


def _plain(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The batch with every value written out, also of columns that name each value once."""
    import pyarrow

    for i, column in enumerate(batch.columns):
        if pyarrow.types.is_dictionary(column.type):
            batch = batch.set_column(i, batch.schema.field(i).name, column.dictionary_decode())
    return batch


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers by the ending of a file's name."""
