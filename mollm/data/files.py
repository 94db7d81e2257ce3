"""Rows of a data set: from a local file, a folder or the Hugging Face hub.

Single files are read here and not by the package `datasets`, which guesses types: of the answers
"42", "NA" and "2020-01-01" in a text file it makes a number, a null and a date, and it does not say
which line is malformed. Folders and the hub are its own.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mollm.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

Unit = Literal["line", "row"]

_FORMATS = "a .jsonl, .json, .csv or .parquet file"
_ON_DISK = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of the package `datasets` leaves in a folder."""


@dataclass(frozen=True)
class Table:
    """The rows of a data set, at least one, each with its number."""

    name: str
    """The file, the folder or the name on the hub, with the config and the split where given."""
    unit: Unit
    """What a number counts, from 1: lines of a text file, or rows."""
    columns: tuple[str, ...]
    rows: Iterable[tuple[int, Mapping[str, Any]]]


def read_table(
    source: str | Path | Dataset, *, config: str | None = None, split: str | None = None
) -> Table:
    """Reads a data set.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a folder of such files or one written by
            `save_to_disk`, a name on the hub, or a `datasets.Dataset`. No code of a data set is
            ever run.
        config: The subset of a hub data set, such as forget10.
        split: The split of a folder or a hub data set; None for train.

    Raises:
        UsageError: There is no such data set, it cannot be read, it is of another type, or it
            holds no row.
    """
    if not isinstance(source, str | Path):
        return _table_of(_checked(source), "the data set")
    path = Path(source).expanduser()
    if str(source) and path.is_dir():
        return _read_dataset(str(path), config, split)
    if not path.is_file():
        _refuse_missing_file(str(source))
        return _read_dataset(str(source), config, split)
    if config or split:
        raise UsageError(
            f"config and split must not be given for a file, but got "
            f"{config or split!r} for {source}: a file is read whole."
        )
    if path.suffix.lower() not in _READERS:
        raise UsageError(f"data must be {_FORMATS}, but got {source}: unpack or convert it.")
    return _READERS[path.suffix.lower()](path)


def sample_path(name: str) -> Path:
    """The path of a small data set that comes with the package, such as authors-forget.jsonl.

    Raises:
        UsageError: There is no such sample.
    """
    folder = Path(str(resources.files("mollm"))) / "samples"
    names = sorted(path.name for path in folder.iterdir())
    if name not in names:
        raise UsageError(f"a sample must be one of {', '.join(names)}, but got {name!r}.")
    return folder / name


def _refuse_missing_file(source: str) -> None:
    if Path(source).suffix.lower() in _READERS or source.startswith((".", "/", "~")) or not source:
        raise UsageError(
            f"data must be {_FORMATS}, a folder or a data set on the hub, but got "
            f"{source or 'an empty name'}, which is not on this machine."
        )


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} must be UTF-8 text, but its byte {error.start} is not: save it as UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _table(path: Path, unit: Unit, rows: list[tuple[int, dict[str, Any]]]) -> Table:
    if not rows:
        raise UsageError(f"{path} must hold at least one row, but it holds none.")
    columns = dict.fromkeys(name for _, row in rows for name in row)
    return Table(str(path), unit, tuple(columns), rows)


def _read_lines(path: Path) -> Table:
    lines = enumerate(_text(path).split("\n"), 1)
    rows = [(number, _parse_line(path, number, line)) for number, line in lines if line.strip()]
    return _table(path, "line", rows)


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {number} must hold one JSON object, but at column {error.colno} it "
            f"is malformed: {error.msg}."
        ) from error
    return _object(row, f"{path}, line {number}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{place} must hold one JSON object, but got {shown(row)}.")
    return row


def _read_json(path: Path) -> Table:
    text = _text(path)
    if not text.lstrip().startswith("["):  # many a .json file has an object on every line
        return _read_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno} is malformed JSON at column {error.colno}: {error.msg}."
        ) from error
    numbered = [(i, _object(row, f"{path}, row {i}")) for i, row in enumerate(rows, 1)]
    return _table(path, "row", numbered)


def _read_csv(path: Path) -> Table:
    with _cells_of_any_length():
        (_, header), *lines = [*_csv_lines(path)] or [(1, [])]
    if len(set(header)) < len(header):
        raise UsageError(f"{path} must have columns of different names, but got {listed(header)}.")
    rows = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise UsageError(
                f"{path}, line {number} must have {len(header)} cells like the header, but it "
                f"has {len(cells)}: put cells that hold a comma in double quotes."
            )
        rows.append((number, dict(zip(header, cells, strict=True))))
    return _table(path, "line", rows)


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
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
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
    # Read in place: `datasets` would take a bracket in the name for a pattern, and keep a copy.
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(f"{path} cannot be read: {reason}.") from error
    return _table(path, "row", list(enumerate(rows, 1)))


_READERS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_dataset(source: str, config: str | None, split: str | None) -> Table:
    import datasets

    name = " ".join(part for part in (source, config, split) if part)
    try:
        loaded = _load(source, config, split or "train")
    except Exception as error:  # whatever a reader of some format raises, even StopIteration
        # A failure to build says nothing itself: its cause does.
        built = not isinstance(error, datasets.exceptions.DatasetGenerationError)
        told = error if built else error.__cause__
        reason = " ".join(str(told).split())[:300].rstrip(".") or type(told).__name__
        raise UsageError(f"the data set {name} cannot be loaded: {reason}.") from error
    return _table_of(loaded, name)


def _checked(source: Any) -> Dataset:
    import datasets

    if isinstance(source, datasets.DatasetDict):
        raise UsageError(
            f"data must be one data set, but got a DatasetDict: choose one of its splits "
            f"{listed(source)}."
        )
    if not isinstance(source, datasets.Dataset):
        raise UsageError(
            f"data must be {_FORMATS}, a folder, a data set on the hub or a datasets.Dataset, but "
            f"got {type(source).__name__}."
        )
    return source


def _table_of(loaded: Dataset, name: str) -> Table:
    if not loaded.num_rows:
        raise UsageError(f"{name} must hold at least one row, but it holds none.")
    return Table(name, "row", tuple(loaded.column_names), enumerate(loaded, 1))


def _load(source: str, config: str | None, split: str) -> Any:
    import datasets

    if not any((Path(source) / name).is_file() for name in _ON_DISK):
        return datasets.load_dataset(source, config, split=split)
    saved = datasets.load_from_disk(source)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"its splits are {listed(saved)}, but got {split!r}")
    return saved[split]


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long, for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


def listed(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(names) or "none"
