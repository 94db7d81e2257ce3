"""Scores of single examples, and the JSONL file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mollm.data.files import read_table
from mollm.errors import UsageError
from mollm.system.folders import replace_text

EXAMPLES_FILE = "examples.jsonl"


@dataclass(frozen=True)
class Record:
    """One example with all that was measured on it: every figure is made of these alone."""

    group: str
    """The set that the example is from, such as "forget"."""
    question: str
    answer: str
    reply: str | None
    """What the model answered; None where it was not asked."""
    scores: dict[str, float]
    """Scores by name, see `mollm.evaluation.registry`."""


@dataclass(frozen=True)
class Examined:
    """The records of a set, or of a part of one."""

    records: tuple[Record, ...]
    cut_off: int = 0
    """How many replies were cut off within a thought, and count as empty."""


def write_records(records: Iterable[Record], path: Path) -> None:
    """Writes one JSON object per line; numbers are kept to the last bit."""
    lines = [json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) for record in records]
    replace_text(path, "".join(line + "\n" for line in lines))


def read_records(path: Path | str) -> tuple[Record, ...]:
    """Reads what `write_records` wrote: the file, or the folder of the evaluation that it is in.

    Raises:
        UsageError: There is no such file, or a line of it is something else.
    """
    path = Path(path)
    table = read_table(path / EXAMPLES_FILE if path.is_dir() else path)
    records = []
    for number, row in table.rows:
        try:
            records.append(Record(**row))
            made = records[-1]
            texts = made.group, made.question, made.answer
            valid = all(isinstance(text, str) for text in texts)
            valid = valid and all(isinstance(value, float) for value in made.scores.values())
        except (TypeError, AttributeError):
            valid = False
        if not valid:
            raise UsageError(
                f"{table.name}, {table.unit} {number} must be a record of `mollm evaluate`, but it "
                "is not."
            )
    return tuple(records)
