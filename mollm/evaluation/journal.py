"""What an evaluation has measured so far, kept in a file so that one that was stopped goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from mollm.errors import UsageError
from mollm.evaluation.records import Examined, Record
from mollm.system.folders import replace_text
from mollm.system.parsing import parse_json_lines

_MODELS = ("Original", "Result")


def journal_file(folder: Path, model: str) -> Path:
    """Where the journal of the Original or of the Result is kept."""
    return folder / f"unfinished-{model.lower()}.jsonl"


def remove_journals(folder: Path) -> None:
    """Removes the journals of an evaluation that is complete, for they tell what was forgotten."""
    for model in _MODELS:
        journal_file(folder, model).unlink(missing_ok=True)


class Journal:
    """Records in the order in which they were made, a piece of a set on each line.

    What another evaluation left in the file, by its key, is thrown away; so is a last line that was
    not finished.

    Args:
        path: The file.
        key: A hash of all that the records depend on.

    Raises:
        UsageError: The file cannot be read or written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._pieces: dict[tuple[str, int], Examined] = {}
        kept = self._read(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path} must be a file to write to, but is not: {error}.") from error
        first = "".join(line + "\n" for line in kept or [_line({"key": key})])
        replace_text(path, first, follow_link=False)

    @property
    def known(self) -> int:
        """How many records are there."""
        return sum(len(piece.records) for piece in self._pieces.values())

    def get(self, group: str, start: int) -> Examined | None:
        """What was put of a set from the given place on; None if nothing was."""
        return self._pieces.get((group, start))

    def put(self, group: str, start: int, found: Examined) -> None:
        """Keeps records of a set; they are on the disk when this returns."""
        self._pieces[group, start] = found
        piece = {"group": group, "start": start, **asdict(found)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(piece) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, key: str) -> list[str]:
        """The lines that can be used, the first with the key; none of another evaluation."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return []
        used: list[str] = []
        try:
            for _, found in parse_json_lines(text, str(self._path)):
                line = _line(found)
                line.encode()  # raises where a byte is no UTF-8
                if not used and found != {"key": key}:
                    return []
                if used:
                    records = tuple(Record(**each) for each in found["records"])
                    piece = Examined(records, int(found["cut_off"]))
                    self._pieces[found["group"], found["start"]] = piece
                used.append(line)
        except (ValueError, TypeError, LookupError, AttributeError):
            pass  # a line that was not finished, or something else: what stands above it holds
        return used


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
