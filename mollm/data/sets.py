"""The data of a run: read, compared, encoded and hashed before the model trains."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from mollm.data.chat import ChatFormat, Tokens
from mollm.data.encoding import CUT, Encoded, encode_records
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

    Sets: TypeAlias = Data | Mapping[str, Data]
    """One set, or several by name."""

AUTO = "auto"
"""Given as data to retain where the model is to make them, see `mollm.training.own_retain`."""
_EVAL = "eval "
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")

STREAMED_ROWS = 100_000
"""The most rows of a streaming data set: all rows of a run are held in memory, since every epoch
shuffles all of them."""


@dataclass(frozen=True)
class TrainingData:
    """The sets of a run by name: forget, retain and, to evaluate on, "eval forget" and so on.

    Where a role has several sets, they are "forget_alice", "forget_bob" and so on.
    """

    records: dict[str, list[Record]]
    encoded: dict[str, Encoded]
    facts: dict[str, dict[str, Any]]
    """Source, number of rows and hash of each."""
    notes: tuple[str, ...]
    """What the user should know."""

    def named(self, role: Role) -> list[str]:
        """The sets to train on that have this role."""
        return [n for n in self.rows if not n.startswith(_EVAL) and of_role(n) == role]

    @property
    def rows(self) -> dict[str, list[Tokens]]:
        """What is trained and evaluated on."""
        return {name: each.rows for name, each in self.encoded.items()}

    def looked_at(self, role: Role) -> list[str]:
        """The sets by which a model is judged: those to evaluate on, if any has this role."""
        return [n for n in self.rows if n.startswith(_EVAL) and of_role(n) == role] or (
            self.named(role)
        )

    @property
    def evaluated(self) -> dict[str, list[Tokens]]:
        """The rows to evaluate on, by the name of their set."""
        named = {n: rows for n, rows in self.rows.items() if n.startswith(_EVAL)}
        return {name.removeprefix(_EVAL): rows for name, rows in named.items()}


def read_data(
    forget: Sets,
    retain: Sets,
    evaluate: Mapping[str, Sets] | None,
    chat: ChatFormat,
    max_length: int,
    train_on_turns: str = "last",
    long_rows: str = CUT,
) -> TrainingData:
    """Reads all sets of a run.

    Args:
        forget: What to forget, as MOLLMTrainer takes it: one set, or several by name.
        retain: What to keep.
        evaluate: Sets "forget" and "retain", or one of them, to evaluate on; one of several sets
            by the name of its objective.
        chat: The format of the model.
        max_length: The most tokens of a row.
        train_on_turns: As for `encode_records`; so is long_rows.

    Raises:
        UsageError: A set cannot be read, has a row that does not fit, or forget and retain overlap
            too much.
    """
    to_forget = {n: records_of(d, "forget") for n, d in named_sets(forget, "forget").items()}
    to_retain = {n: records_of(d, "retain") for n, d in named_sets(retain, "retain").items()}
    overlap = [
        check_overlap(gone, kept).note for gone in to_forget.values() for kept in to_retain.values()
    ]
    records = to_forget | to_retain
    for key, sets in (evaluate or {}).items():
        for name, data in sets_to_evaluate(key, sets).items():
            records[f"{_EVAL}{name}"] = records_of(data, role_of(name))
    encoded = {
        name: encode_records(
            rows,
            chat,
            max_length=max_length,
            name=name,
            train_on_turns=train_on_turns,
            long_rows=long_rows,
        )
        for name, rows in records.items()
    }
    notes = [*overlap, *(note for each in encoded.values() for note in each.notes)]
    return TrainingData(
        records=records,
        encoded=encoded,
        facts={
            name: {"source": r[0].source or "records", "rows": len(r), "sha256": content_hash(r)}
            for name, r in records.items()
        },
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )


def named_sets(data: Sets, role: Role) -> dict[str, Data]:
    """The sets of a role by the names of their objectives.

    Raises:
        UsageError: A name is none.

    Example:
        >>> named_sets({"alice": "alice.jsonl", "bob": {"path": "bob.jsonl"}}, "forget")
        {'forget_alice': 'alice.jsonl', 'forget_bob': {'path': 'bob.jsonl'}}
        >>> named_sets("retain.jsonl", "retain")
        {'retain': 'retain.jsonl'}
    """
    options = ("path", *inspect.signature(load_records).parameters)
    if not _by_name(data) or not data or any(name in options for name in data):
        return {role: cast("Data", data)}
    for name in data:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"a set of the {role} data must have a name of letters, digits, - and _, but got "
                f"{name!r}: choose a short name."
            )
    return {f"{role}_{name}": one for name, one in data.items()}


def sets_to_evaluate(key: str, sets: Sets) -> dict[str, Data]:
    """The sets that stand under a key of `eval_dataset`, a role or the name of an objective.

    Raises:
        UsageError: The key or a name is none.
    """
    role = role_of(key)
    return named_sets(sets, role) if key == role else {key: cast("Data", sets)}


def _by_name(data: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is a mapping of ours: splits of `datasets` are one too."""
    return isinstance(data, Mapping) and not type(data).__module__.startswith("datasets.")


def records_of(data: Data, role: Role) -> list[Record]:
    """One set, as MOLLMTrainer takes it.

    Of a streaming data set at most STREAMED_ROWS rows are read.

    Raises:
        UsageError: It cannot be read, is empty, or is a stream of more rows.
    """
    if isinstance(data, str) and data == AUTO:
        raise UsageError(
            f"the {role} data must be rows that are there, but got {AUTO!r}, for which only a run "
            "makes retain data: take the file retain-auto-….jsonl in a run's folder, or write "
            f"./{AUTO} for a file of that name."
        )
    if _by_name(data):
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
                f"config, split and where, but got {', '.join(options)}."
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
    if not isinstance(rows[0], kind):
        raise UsageError(
            f"the {role} data must be a list of mollm.data.Record or one of dicts, but row 0 is "
            f"{type(rows[0]).__name__}: give several files as sets by name, "
            "such as {first: one.jsonl, second: two.jsonl}."
        )
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


def of_role(name: str) -> Role:
    """The role of a set of TrainingData."""
    return role_of(name.removeprefix(_EVAL))


def role_of(name: str) -> Role:
    """The role of a set by its name, such as "forget" or "forget_alice".

    Raises:
        UsageError: There is no such role.
    """
    role = name.split("_")[0]
    if role == "forget":
        return "forget"
    if role == "retain":
        return "retain"
    raise UsageError(f"eval_dataset must hold 'forget' and 'retain' alone, but got {name!r}.")
