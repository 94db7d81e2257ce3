"""The data of a run: read, compared, encoded and hashed before the model trains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from mollm.data.chat import ChatFormat, Tokens
from mollm.data.encoding import Encoded, encode_records
from mollm.data.records import Record, Role, check_overlap, content_hash, load_records
from mollm.errors import UsageError
from mollm.system.parsing import reason_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Data: TypeAlias = (
        str
        | Path
        | Mapping[str, Any]
        | Sequence[Record]
        | Sequence[dict[str, Any]]
        | Dataset
        | IterableDataset
    )

_EVAL = "eval "

STREAMED_ROWS = 100_000
"""The most rows of a streaming data set: all rows of a run are held in memory, since every epoch
shuffles all of them."""


@dataclass(frozen=True)
class TrainingData:
    """The sets of a run by name: forget, retain and, to evaluate on, "eval forget" and so on."""

    records: dict[str, list[Record]]
    encoded: dict[str, Encoded]
    facts: dict[str, dict[str, Any]]
    """Source, number of rows and hash of each."""
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def rows(self) -> dict[str, list[Tokens]]:
        """What is trained and evaluated on."""
        return {name: each.rows for name, each in self.encoded.items()}

    @property
    def evaluated(self) -> dict[str, list[Tokens]]:
        """The rows to evaluate on, by role."""
        named = {n: rows for n, rows in self.rows.items() if n.startswith(_EVAL)}
        return {name.removeprefix(_EVAL): rows for name, rows in named.items()}


def read_data(
    forget: Data,
    retain: Data,
    evaluate: Mapping[str, Data] | None,
    chat: ChatFormat,
    max_length: int,
    train_on_turns: str = "last",
) -> TrainingData:
    """Reads all sets of a run.

    Args:
        forget: What to forget, as MOLLMTrainer takes it.
        retain: What to keep.
        evaluate: Sets "forget" and "retain", or one of them, to evaluate on.
        chat: The format of the model.
        max_length: The most tokens of a row.
        train_on_turns: As for `encode_records`.

    Raises:
        UsageError: A set cannot be read, has a row that does not fit, or forget and retain overlap
            too much.
    """
    records = {"forget": records_of(forget, "forget"), "retain": records_of(retain, "retain")}
    for name, data in (evaluate or {}).items():
        records[f"{_EVAL}{name}"] = records_of(data, role_of(name))
    overlap = check_overlap(records["forget"], records["retain"]).note
    encoded = {
        name: encode_records(
            rows, chat, max_length=max_length, name=name, train_on_turns=train_on_turns
        )
        for name, rows in records.items()
    }
    notes = [overlap, *(note for each in encoded.values() for note in each.notes)]
    return TrainingData(
        records=records,
        encoded=encoded,
        facts={
            name: {"source": r[0].source or "records", "rows": len(r), "sha256": content_hash(r)}
            for name, r in records.items()
        },
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )


def records_of(data: Data, role: Role) -> list[Record]:
    """One set, as MOLLMTrainer takes it.

    Of a streaming data set at most STREAMED_ROWS rows are read.

    Raises:
        UsageError: It cannot be read, is empty, or is a stream of more rows.
    """
    # Splits of `datasets` are a mapping too, whose message is another one.
    if isinstance(data, Mapping) and not type(data).__module__.startswith("datasets."):
        options: dict[str, Any] = dict(data)
        if "path" not in options:
            raise UsageError(
                f"the {role} data must be given by a path, but got only "
                f"{', '.join(options) or 'nothing'}: add path."
            )
        try:
            return load_records(options.pop("path"), role=role, **options)
        except TypeError as error:
            raise UsageError(
                f"the {role} data must be given by path, schema, prompt_field, answer_field, "
                f"config and split, but got {', '.join(options)}."
            ) from error
    if isinstance(data, Sequence) and not isinstance(data, str):
        return _listed(data, role)
    if not isinstance(data, str | Path) and _is_stream(data):
        return _listed(_first_rows(data, role), role)
    return load_records(cast("Dataset", data), role=role)


def _is_stream(data: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(data, IterableDataset)


def _first_rows(stream: Any, role: Role) -> list[dict[str, Any]]:
    rows = list(itertools.islice(stream, STREAMED_ROWS + 1))
    if len(rows) > STREAMED_ROWS:
        raise UsageError(
            f"the {role} data must have at most {STREAMED_ROWS} rows where it is streamed, but "
            f"has more: take a part of it, with .shuffle(seed=0).take({STREAMED_ROWS})."
        )
    return rows


def _listed(rows: Sequence[Any], role: Role) -> list[Record]:
    if not rows:
        raise UsageError(f"the {role} data must hold at least one row, but it holds none.")
    kind = dict if isinstance(rows[0], dict) else Record
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            raise UsageError(
                f"the {role} data must be a list of mollm.data.Record or one of dicts, but row 0 "
                f"is {type(rows[0]).__name__} and row {number} {type(row).__name__}."
            )
    return _tabled(rows, role) if kind is dict else list(rows)


def _tabled(rows: Sequence[dict[str, Any]], role: Role) -> list[Record]:
    import pyarrow
    from datasets import Dataset

    fields = dict.fromkeys(field for row in rows for field in row)
    try:
        table = Dataset.from_list([{field: row.get(field) for field in fields} for row in rows])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        reason = reason_of(error, None)
        raise UsageError(
            f"the {role} data must have one kind of value in each field, but have not: {reason}."
        ) from error
    return load_records(table, role=role)


def role_of(name: str) -> Role:
    """The role of a set to evaluate on.

    Raises:
        UsageError: There is no such role.
    """
    if name == "forget":
        return "forget"
    if name == "retain":
        return "retain"
    raise UsageError(f"eval_dataset must hold 'forget' and 'retain' alone, but got {name!r}.")
