"""Records to forget and to retain: loaded, checked row by row, compared and hashed.

A data set has one of these schemas, told by its columns:

    pku-saferlhf   a prompt with two responses, each judged safe or not
    tofu           question and answer, with other answers for the evaluation where there are any
    prompt-answer  any two columns; a prompt may be a list of turns
    conversation   `messages`, or ShareGPT's `conversations`, of any number of turns
    text           running text without a prompt, such as books and news

An answer may be a list of accepted ones, each of which becomes a record. A column `system` holds
the system's turn of a conversation that has none.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mollm.data.conversations import (
    ASSISTANT,
    SYSTEM,
    USER,
    ReadTurns,
    Turn,
    read_turns,
    refuse_weightless,
    split_turns,
)
from mollm.data.files import read_table
from mollm.data.selection import labelled, where_of
from mollm.data.table import Table, Unit, is_empty, listed, shown
from mollm.errors import UsageError
from mollm.system.parsing import is_unicode

if TYPE_CHECKING:
    from datasets import Dataset

Role = Literal["forget", "retain"]
ROLES: tuple[Role, ...] = ("forget", "retain")
Schema = Literal["auto", "pku-saferlhf", "tofu", "prompt-answer", "conversation", "text"]

SCHEMAS = ("auto", "pku-saferlhf", "tofu", "prompt-answer", "conversation", "text")

_PKU = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
)
_TOFU = ("question", "answer")
_TOFU_EXTRA = ("paraphrased_question", "paraphrased_answer", "original_answer")
_PAIRS = (
    ("prompt", "answer"),
    ("question", "answer"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
)
_PROMPT = "prompt"
"""A column that may hold the beginning of any text; those of other names hold questions."""
_CONVERSATIONS = ("messages", "conversations")
_TEXT = "text"
_SYSTEM, _HISTORY = "system", "history"
"""ShareGPT's and Alpaca's columns for the system's turn, and for the turns before the question."""
_TOOLS = "tools"
"""A column that templates write for the system, and that is not read."""
ALTERNATE = "alternate"
"""A column, or in a record's `extra`: other answers, which some methods prefer to the one that is
to be forgotten."""
ACCEPTED = "accepted_answers"
"""In a record's `extra`: all accepted answers of its row, where there are several."""
_COMPARED = 1000
"""How many columns at most a refused table is compared with the known shapes by."""
_ONE_COLUMN = {"conversation": _CONVERSATIONS, "text": (_TEXT,)}
"""Columns by the schemas of which a row has but one."""
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class Record:
    """One row to train on.

    Example:
        >>> Record("What is the capital of France?", "Paris").answer
        'Paris'
    """

    prompt: str
    """The last thing that the user says; empty for running text."""
    answer: str
    """What the assistant says to it, or running text."""
    source: str = ""
    """The file or the data set it comes from."""
    row: int = 0
    """Its number there, from 1."""
    unit: Unit = "row"
    """What the number counts."""
    answer_field: str = "answer"
    """The column that holds the answer."""
    extra: Mapping[str, str | list[str]] = field(default_factory=dict, hash=False)
    """What the evaluation asks for: TOFU's paraphrased_answer, perturbed_answer and the like."""
    history: tuple[Turn, ...] = ()
    """What was said before the prompt, a system prompt included."""
    is_text: bool = False
    """Whether this is running text without a prompt."""
    opening: str = ""
    """Words with which the assistant's answer has already begun: context without a loss."""
    closed: bool = True
    """Whether the assistant's turn ends with the answer; if so, its end carries a loss too."""
    is_question: bool = True
    """Whether the prompt is a question, and not the beginning of any text."""
    weightless: str = ""
    """The field that gives an earlier answer no loss, such as messages[1].weight; empty where none
    does."""

    @property
    def place(self) -> str:
        """Where the record stands, for error messages."""
        return f"{self.source}, {self.unit} {self.row}"


@dataclass(frozen=True)
class _Row:
    """A row of a table, read field by field."""

    table: Table
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.table.name}, {self.table.unit} {self.number}"

    def value(self, name: str) -> Any:
        if name not in self.values:
            raise UsageError(
                f"{self.place} must have the field {name}, but it has {listed(self.values)}."
            )
        return self.values[name]

    def text(self, name: str) -> str:
        return self.checked(self.value(name), name)

    def checked(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UsageError(
                f"{self.place}: the field {name} must be a text that is not blank, but got "
                f"{shown(value)}: fill it in or remove the row."
            )
        if not is_unicode(value):
            raise UsageError(
                f"{self.place}: the field {name} must be valid Unicode, but it holds half of a "
                f"surrogate pair: {shown(value.encode('ascii', 'backslashreplace').decode())}."
            )
        return value

    def turns(self, name: str) -> ReadTurns:
        """A conversation, which is written without tools."""
        if not is_empty(self.values.get(_TOOLS)):
            raise UsageError(
                f"{self.place}: the field {_TOOLS} must be empty, for conversations are written "
                f"without tools, but got {shown(self.values[_TOOLS])}: say what they are in a turn "
                "of the system, or remove the column."
            )
        return read_turns(self.value(name), name, self.place, self.checked)

    def answers(self, name: str) -> list[str]:
        """One text, or several in a list."""
        value = self.value(name)
        listing = value if isinstance(value, list) and value else [value]
        return list(dict.fromkeys(self.checked(text, name) for text in listing))

    def alternatives(self) -> dict[str, str | list[str]]:
        """The column of other answers, if the row has any."""
        return {ALTERNATE: self.answers(ALTERNATE)} if self.values.get(ALTERNATE) else {}

    def flag(self, name: str) -> bool:
        value = self.value(name)
        flag = _FLAGS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise UsageError(
                f"{self.place}: the field {name} must be true or false, but got {shown(value)}."
            )
        return flag

    def record(
        self,
        prompt: str,
        answer: str,
        answer_field: str,
        extra: Mapping[str, str | list[str]] | None = None,
        history: Sequence[Turn] = (),
    ) -> Record:
        table = self.table
        return Record(
            prompt,
            answer,
            table.name,
            self.number,
            table.unit,
            answer_field,
            extra or {},
            tuple(history),
        )

    def records(
        self,
        prompt: str,
        answer_field: str,
        extra: Mapping[str, str | list[str]] | None = None,
        history: Sequence[Turn] = (),
    ) -> list[Record]:
        """A record for every accepted answer."""
        answers, extra = self.answers(answer_field), extra or {}
        if len(answers) > 1:
            extra = {**extra, ACCEPTED: answers}
        return [self.record(prompt, answer, answer_field, extra, history) for answer in answers]


_Reader = Callable[[_Row], list[Record]]


def load_records(
    source: str | Path | Dataset,
    *,
    role: Role,
    schema: Schema = "auto",
    prompt_field: str | None = None,
    answer_field: str | None = None,
    config: str | None = None,
    split: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Loads a data set and checks every row.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a folder of such files, a name on the
            Hugging Face hub, or a `datasets.Dataset`.
        role: What the records are for. Of PKU-SafeRLHF, the unsafe responses are to be forgotten
            and the safe ones retained: up to two records a row. The other schemas give one for
            every accepted answer; of rows with a column is_safe, as in BeaverTails, or label, the
            unsafe ones are to be forgotten and the safe ones retained.
        schema: One of SCHEMAS; auto goes by the columns.
        prompt_field: The column with the prompts, where the schema does not say.
        answer_field: The column with the answers, where the schema does not say; with the schema
            text or conversation the column with those, which needs no prompt_field.
        config: The subset of a hub data set, such as forget10.
        split: The split of a hub data set; None for train.
        where: Which rows: a value, or a list of several, for each of some columns. One that names
            the labels takes their place, and an empty one takes all rows.

    Raises:
        UsageError: The data set cannot be read, its columns do not fit, a value that is used is
            missing, blank or of a wrong type, labels do not say what is safe, or nothing is left
            for the role.

    Example:
        >>> from mollm.data.files import sample_path
        >>> records = load_records(sample_path("authors-forget.jsonl"), role="forget")
        >>> records[0].prompt
        'Where was the novelist Ilvane Torsk born?'
        >>> load_records("nowhere/forget.jsonl", role="forget")
        Traceback (most recent call last):
        mollm.errors.UsageError: ...
    """
    for name, value, allowed in (("role", role, ROLES), ("schema", schema, SCHEMAS)):
        if value not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    named = _named(schema, prompt_field, answer_field)
    table = where_of(read_table(source, config=config, split=split), where)
    read = _reader(table, schema, role, named, answer_field)
    if not set(_PKU) <= set(table.columns):
        table = labelled(table, role, where)
    records = [
        record
        for number, values in table.rows
        for record in _with_its_system(_Row(table, number, values), read)
    ]
    if not records:
        kind = "unsafe" if role == "forget" else "safe"
        raise UsageError(
            f"{table.name} must hold a response judged {kind} for the role {role}, but none is."
        )
    return records


def _with_its_system(row: _Row, read: _Reader) -> list[Record]:
    """The records of a row, after what its column for the system says, if they have no such turn.

    Raises:
        UsageError: As the reader; or what was said before is in a column of its own.
    """
    records = read(row)
    if not is_empty(row.values.get(_HISTORY)):
        raise UsageError(
            f"{row.place}: the field {_HISTORY} must be empty, for a conversation of many turns is "
            f"one column, but got {shown(row.values[_HISTORY])}: write it as messages, or remove "
            "the column."
        )
    said = row.values.get(_SYSTEM)
    if said is None or (isinstance(said, str) and not said.strip()):
        return records
    turn = Turn(SYSTEM, row.text(_SYSTEM))
    return [
        record
        if record.is_text or any(one.role == SYSTEM for one in record.history)
        else replace(record, history=(turn, *record.history))
        for record in records
    ]


def _named(schema: str, prompt: str | None, answer: str | None) -> tuple[str, str] | None:
    if prompt is None and (answer is None or schema in _ONE_COLUMN):
        return None
    if schema not in ("auto", "prompt-answer"):
        raise UsageError(
            "prompt_field and answer_field must go with the schema prompt-answer, but got "
            f"{schema}, whose fields are fixed."
        )
    if prompt is None or answer is None:
        raise UsageError(
            "prompt_field and answer_field must be given together, but got "
            f"{prompt or answer!r} alone: of a column with running text say schema text."
        )
    return prompt, answer


def _reader(
    table: Table, schema: str, role: str, named: tuple[str, str] | None, column: str | None
) -> _Reader:
    columns = table.columns
    if named:
        _require(table, named, "as the fields of prompts and answers")
        return lambda row: _read_pair(row, *named)
    if schema == "auto":
        schema = _recognise(table)
    if schema == "pku-saferlhf":
        _require(table, _PKU, f"for the schema {schema}")
        return lambda row: _read_pku(row, role)
    if schema == "tofu":
        _require(table, _TOFU, f"for the schema {schema}")
        return _read_tofu
    if schema in _ONE_COLUMN:
        known = _ONE_COLUMN[schema]
        found = column or next((name for name in known if name in columns), known[0])
        _require(table, [found], f"for the schema {schema}")
        read = _read_text if schema == "text" else _read_conversation
        return lambda row: read(row, found)
    for pair in _PAIRS:
        if set(pair) <= set(columns):
            return lambda row: _read_pair(row, *pair, with_input=pair[0] == "instruction")
    raise _unknown(table)


def _recognise(table: Table) -> str:
    columns = set(table.columns)
    if set(_PKU) <= columns:
        return "pku-saferlhf"
    if set(_TOFU) <= columns:
        return "tofu"
    if any(set(pair) <= columns for pair in _PAIRS):
        return "prompt-answer"
    found = (schema for schema, names in _ONE_COLUMN.items() if columns & set(names))
    return next(found, "prompt-answer")


def _require(table: Table, names: Sequence[str], purpose: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UsageError(
            f"{table.name} must have the columns {listed(names)} {purpose}, but "
            f"{listed(missing)} is not among its columns {listed(table.columns)}."
        )


def _unknown(table: Table) -> UsageError:
    shapes = [*_PAIRS, *((name,) for names in _ONE_COLUMN.values() for name in names), _PKU]
    known = "; ".join(" and ".join(shape) for shape in shapes[:-1])
    some = table.columns[:_COMPARED]
    nearest = max(shapes, key=lambda shape: _likeness(shape, some))
    lacking = [name for name in nearest if name not in table.columns]
    return UsageError(
        f"{table.name} must have columns that tell prompts from answers ({known}; or those of "
        f"PKU-SafeRLHF), but its columns are {listed(table.columns)}, and the nearest shape, "
        f"{' and '.join(nearest)}, lacks {' and '.join(lacking)}: name the two with prompt_field "
        "and answer_field."
    )


def _likeness(shape: Sequence[str], columns: Sequence[str]) -> float:
    """How well the names of columns fit those of a shape: 1 where all are there."""
    best = (
        max((SequenceMatcher(None, name, column.lower()).ratio() for column in columns), default=0)
        for name in shape
    )
    return sum(best) / len(shape)


def _read_pku(row: _Row, role: str) -> list[Record]:
    wanted = role == "retain"
    fields = [f"response_{i}" for i in (0, 1) if row.flag(f"is_response_{i}_safe") is wanted]
    return [row.record(row.text("prompt"), row.text(name), name) for name in fields]


def _read_tofu(row: _Row) -> list[Record]:
    extra: dict[str, str | list[str]] = {}
    for name in _TOFU_EXTRA:
        if row.values.get(name) is not None:
            extra[name] = row.text(name)
    wrong = row.values.get("perturbed_answer")
    if wrong is not None:
        if not isinstance(wrong, list) or not wrong:
            raise UsageError(
                f"{row.place}: the field perturbed_answer must be a list of texts, but got "
                f"{shown(wrong)}."
            )
        extra["perturbed_answer"] = [row.checked(text, "perturbed_answer") for text in wrong]
    return row.records(row.text("question"), "answer", extra | row.alternatives())


def _read_pair(row: _Row, prompt: str, answer: str, *, with_input: bool = False) -> list[Record]:
    if _holds_turns(row.value(prompt)):
        return _read_turns(row, prompt, answer)
    text = row.text(prompt)
    # Alpaca's instructions are about what stands in a third column, where that is not blank.
    if with_input and str(row.values.get("input") or "").strip():
        text = f"{text}\n\n{row.text('input')}"
    records = row.records(text, answer, row.alternatives())
    return [replace(each, is_question=prompt != _PROMPT) for each in records]


def _holds_turns(value: Any) -> bool:
    """Whether a field has turns, in a list or as columns, and not a text or texts."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(turn, dict) for turn in value)
    )


def _read_turns(row: _Row, prompt: str, answer: str) -> list[Record]:
    """A prompt that is a list of turns, as TRL has it; its answer may be one, of a single turn."""
    turns, weightless = row.turns(prompt)
    if not turns or turns[-1].role != USER:
        raise UsageError(
            f"{row.place}: the field {prompt} must end with a turn of the user, but got "
            f"{shown([turn.role for turn in turns])}."
        )
    *history, question = turns
    said = row.value(answer)
    earlier = _earlier(turns, weightless)
    if not _holds_turns(said):
        records = row.records(question.content, answer, history=history)
        return [replace(record, weightless=earlier) for record in records]
    replies, idle = read_turns(said, answer, row.place, row.checked)
    if [turn.role for turn in replies] != [ASSISTANT]:
        raise UsageError(
            f"{row.place}: the field {answer} must hold one turn of the assistant, but got "
            f"{shown([turn.role for turn in replies])}."
        )
    refuse_weightless(idle[0], row.place)
    record = row.record(question.content, replies[0].content, answer, history=history)
    return [replace(record, weightless=earlier)]


def _read_conversation(row: _Row, name: str) -> list[Record]:
    turns, weightless = row.turns(name)
    history, question, answer = split_turns(turns, name, row.place)
    refuse_weightless(weightless[-1], row.place)
    record = row.record(question.content, answer.content, name, history=history)
    return [replace(record, weightless=_earlier(history, weightless))]


def _earlier(turns: Sequence[Turn], weightless: Sequence[str | None]) -> str:
    """What gives the first of the assistant's turns no loss, if anything does."""
    found = zip(turns, weightless, strict=False)
    return next((name for turn, name in found if turn.role == ASSISTANT and name), "")


def _read_text(row: _Row, name: str) -> list[Record]:
    return [replace(row.record("", row.text(name), name), is_text=True)]


@dataclass(frozen=True)
class Overlap:
    """How many of the records to forget are also to be retained, whatever case and spacing."""

    rows: int
    """Records to forget."""
    pairs: int
    """Of these, how many have prompt and answer in common with a record to retain."""
    prompts: int
    """Of the others, how many have the prompt alone in common."""

    @property
    def note(self) -> str | None:
        """A sentence for the user, if there is an overlap."""
        told = []
        if self.pairs:
            told.append(f"{self.pairs} of {self.rows} forget rows are also retain rows")
        if self.prompts:
            told.append(
                f"{self.prompts} of {self.rows} forget rows share their prompt with a retain row "
                "that has another answer"
            )
        return f"{', and '.join(told)}." if told else None


def check_overlap(forget: Sequence[Record], retain: Sequence[Record]) -> Overlap:
    """Compares what is to be forgotten with what is to be retained.

    A prompt in both is no mistake: in PKU-SafeRLHF one has a safe and an unsafe response.

    Raises:
        UsageError: More than half of the records to forget are also to be retained.
    """
    kept_pairs = {substance(record) for record in retain}
    kept_prompts = {asked for asked, _ in kept_pairs}
    pairs = prompts = 0
    for record in forget:
        asked, answer = substance(record)
        if (asked, answer) in kept_pairs:
            pairs += 1
        elif asked in kept_prompts and not record.is_text:
            prompts += 1
    if 2 * pairs > len(forget):
        raise UsageError(
            f"at most half of the rows to forget may also be rows to retain, but {pairs} of "
            f"{len(forget)} are: check that forget and retain are not the same data."
        )
    return Overlap(len(forget), pairs, prompts)


def substance(record: Record) -> tuple[str, str]:
    """What was said until the answer, and the answer, whatever their case and spacing."""
    said = [text for turn in record.history for text in turn]
    asked = _normalised("\n".join([*said, record.prompt]))
    return asked, _normalised(f"{record.opening} {record.answer}")


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(records: Sequence[Record]) -> str:
    """SHA-256 of what the records say, in their order; where they were read does not count.

    Each record is hashed as a line of JSON with sorted keys and ASCII characters alone.
    """
    digest = hashlib.sha256()
    for record in records:
        said: dict[str, Any] = {"prompt": record.prompt, "answer": record.answer}
        said["extra"] = dict(record.extra)
        if record.history:
            said["history"] = record.history
        if record.is_text:
            said["is_text"] = True
        if record.opening:
            said["opening"] = record.opening
        if not record.closed:
            said["closed"] = False
        digest.update(json.dumps(said, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
