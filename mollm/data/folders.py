"""Rows of a split in a folder on this machine.

A folder is files of rows and nothing else: no README, no loading option and no file name in it
makes anything fetch or read what is not in the folder.

The files of the split train are train.jsonl (or .json, .csv, .parquet) or, in several parts,
train-00000-of-00002.parquet and so on, in the folder itself or in its subfolder `data`. A folder
that `save_to_disk` of the package `datasets` wrote is read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mollm.data.formats import READERS, read_arrow
from mollm.data.table import Rows, Table, listed, shown, table
from mollm.errors import UsageError
from mollm.system.parsing import is_file, parse_json, read_text

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_JSON_BYTES = 1 << 24
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json")
"""Files of `datasets` that hold no rows."""


def read_folder(folder: Path, split: str | None) -> Table:
    """The rows of a split.

    Args:
        folder: The folder.
        split: Its name; None for train, or for the only file of a folder with one.

    Raises:
        UsageError: There is no such split, more than one file could be it, it cannot be read, or
            it leads out of the folder.
    """
    if is_file(folder / _SAVED_SPLITS):
        names = _json_object(folder, _SAVED_SPLITS).get("splits")
        if not isinstance(names, list):
            raise UsageError(f"{folder / _SAVED_SPLITS} must hold a list of splits.")
        wanted = split or "train"
        if wanted not in names:
            raise UsageError(
                f"{folder} must have the split {wanted}, but its splits are {listed(names)}."
            )
        return _read_saved(folder, _inside(folder, folder / wanted), wanted)
    if is_file(folder / _SAVED):
        if split not in (None, "train"):
            raise UsageError(f"{folder} holds one data set without splits, but got {split!r}.")
        return _read_saved(folder, folder, "")
    return _read_files(folder, split)


def _read_files(folder: Path, split: str | None) -> Table:
    found = [_inside(folder, path) for path in sorted(_files(folder))]
    if not found:
        raise UsageError(
            f"{folder} must hold files of rows ({', '.join(READERS)}), but it holds none."
        )
    wanted = split or "train"
    files = [path for path in found if _split_of(path) == wanted]
    if not files and split is None and len(found) == 1:
        files = found
    if not files:
        raise UsageError(
            f"{folder} must hold a file of the split {wanted}, such as {wanted}.jsonl, but it "
            f"holds {listed(path.name for path in found)}: name the split or the file."
        )
    if len(files) > 1 or _PART.fullmatch(files[0].stem):
        _check_parts(folder, wanted, files)
    tables = [READERS[path.suffix.lower()](path) for path in files]
    if len(tables) == 1:
        return tables[0]
    rows = [dict(row) for each in tables for _, row in each.rows]
    return table(f"{folder} {wanted}", "row", list(enumerate(rows, 1)))


def _files(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "data"):
        try:
            inside = list(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise UsageError(f"{place} cannot be read: {error.strerror}.") from error
        for path in inside:
            if path.suffix.lower() in READERS and path.name not in _DESCRIPTIONS and is_file(path):
                yield path


def _split_of(path: Path) -> str:
    part = _PART.fullmatch(path.stem)
    return part["split"] if part else path.stem


def _check_parts(folder: Path, split: str, files: list[Path]) -> None:
    """Several files are one split where they are all of its numbered parts."""
    parts = [_PART.fullmatch(path.stem) for path in files]
    numbers = [int(part["number"]) for part in parts if part]
    counts = {int(part["count"]) for part in parts if part}
    alike = len({(path.parent, path.suffix) for path in files}) == 1 and None not in parts
    if not alike or counts != {len(files)} or sorted(numbers) != list(range(len(files))):
        raise UsageError(
            f"{folder} must hold one file of the split {split}, or all of its parts, but it holds "
            f"{listed(path.name for path in files)}: name the file."
        )


def _read_saved(root: Path, folder: Path, split: str) -> Table:
    state = _json_object(folder, _SAVED, root)
    if state.get("_indices_data_files"):
        raise UsageError(
            f"{folder} must hold its rows in their order, but it holds a selection of them: call "
            "flatten_indices() before save_to_disk()."
        )
    files = state.get("_data_files", [])
    if not isinstance(files, list):
        raise UsageError(f"{folder / _SAVED} must list its files, but got {shown(files)}.")
    names = [file.get("filename") if isinstance(file, dict) else file for file in files]
    rows: list[dict[str, Any]] = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{folder / _SAVED} must name files beside it, but got {shown(name)}.")
        rows += [row for _, row in _read_part(root, folder / name)]
    return table(f"{root} {split}".strip(), "row", list(enumerate(rows, 1)))


def _read_part(root: Path, path: Path) -> Rows:
    if not is_file(path):
        raise UsageError(f"{path} must be there, since {_SAVED} beside it names it.")
    return read_arrow(_inside(root, path))


def _json_object(folder: Path, name: str, root: Path | None = None) -> dict[str, Any]:
    path = folder / name
    if not is_file(path):
        raise UsageError(f"{path} must be there, as `save_to_disk` writes it.")
    value = parse_json(read_text(_inside(root or folder, path), _JSON_BYTES), str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold one JSON object, but got {shown(value)}.")
    return value


def _inside(folder: Path, path: Path) -> Path:
    """The path, unless a link in it leads out of the folder."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read: it is a link to itself.") from error
    if not target.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{path} must lie in {folder}, but it is a link to {target}: name that file itself "
            "where you trust it."
        )
    return path
