"""Rows of a data set: from a local file, a folder or the Hugging Face hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.data.folders import read_folder
from mollm.data.formats import READERS
from mollm.data.hub import is_hub_name, load_from_hub
from mollm.data.table import Table, listed
from mollm.errors import UsageError
from mollm.system.parsing import check_file, is_file, is_folder, user_path

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = "a .jsonl, .json, .csv or .parquet file"


def read_table(
    source: str | Path | Dataset, *, config: str | None = None, split: str | None = None
) -> Table:
    """Reads a data set.

    What is on this machine is read as rows and leaves no copy in a cache. No code of a data set is
    ever run, and nothing that a data set says makes its reader fetch or read anything else.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a folder of such files (see
            `mollm.data.folders`) or one written by `save_to_disk`, a name on the hub, or a
            `datasets.Dataset`.
        config: The subset of a hub data set, such as forget10.
        split: The split of a folder or a hub data set; None for train.

    Raises:
        UsageError: There is no such data set, it cannot be read, it is of another type, or it
            holds no row.
    """
    for name, value in (("config", config), ("split", split)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name} must be a name, but got {value!r}.")
    if not isinstance(source, str | Path):
        return _table_of(_checked(source), "the data set")
    path = user_path(source)
    if str(source) and is_folder(path):
        if config:
            raise UsageError(
                f"config must not be given for a folder, but got {config!r} for {source}: name "
                "the file, or the split."
            )
        return read_folder(path, split)
    if not is_file(path):
        if str(source) and os.path.exists(path):
            check_file(path)  # says what it is
        _refuse_missing_file(str(source))
        name = " ".join(part for part in (str(source), config, split) if part)
        return _table_of(load_from_hub(str(source), config, split or "train"), name)
    if config or split:
        raise UsageError(
            f"config and split must not be given for a file, but got "
            f"{config or split!r} for {source}: a file is read whole."
        )
    if path.suffix.lower() not in READERS:
        raise UsageError(f"data must be {_FORMATS}, but got {source}: unpack or convert it.")
    return READERS[path.suffix.lower()](path)


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
    if Path(source).suffix.lower() in READERS or not is_hub_name(source):
        raise UsageError(
            f"data must be {_FORMATS}, a folder or a data set on the hub (OWNER/NAME), but got "
            f"{source[:200] or 'an empty name'}, which is not on this machine."
        )


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
