"""What a model is asked: TOFU's sets, or those that it was unlearned with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.data import records as data
from mollm.data.chat import Example
from mollm.data.conversations import Turn
from mollm.data.sets import named_sets, records_of
from mollm.errors import UsageError
from mollm.evaluation.open_unlearning import eval_file, read_eval
from mollm.evaluation.records import Record, read_records
from mollm.system.parsing import user_path

if TYPE_CHECKING:
    from mollm.data.sets import Data, Sets

_ENDINGS = (".jsonl", ".json", ".parquet")
_ON_HUB = "locuslab/TOFU"
_PARAPHRASED = "paraphrased_answer"
_WRONG = "perturbed_answer"
_REWORDED = "paraphrased_question"
_WORDS = 400
"""Of a running text, how many words are asked about."""
_LONGEST_WORD = 100
"""In characters; what is longer is of a language that writes no spaces."""


@dataclass(frozen=True)
class Row:
    """One question of a set."""

    question: str
    answer: str
    paraphrased_answer: str | None = None
    """The answer in the words of the perturbed answers; where None, the answer stands for it."""
    perturbed_answers: tuple[str, ...] = ()
    """Wrong answers: in the same words, or the other choices of a multiple-choice question."""
    accepted_answers: tuple[str, ...] = ()
    """All right answers, where there are several: a reply is compared with the nearest one."""
    history: tuple[Turn, ...] = ()
    """What was said before the question, a system prompt included."""
    is_text: bool = False
    """Whether question and answer are the two halves of a running text."""
    paraphrased_question: str | None = None
    """The question in other words, for an audit."""
    opening: str = ""
    """Words with which the answer has already begun when it is scored; `answer` goes on there."""
    closed: bool = True
    """Whether the assistant's turn ends with the answer."""
    is_question: bool = True
    """Whether the question is one, and not the beginning of a text."""

    @property
    def asked(self) -> str | Example:
        """What the model is asked, for `generate_replies`."""
        bare = self.is_question and not (self.history or self.is_text)
        return self.question if bare else self.example("")

    def example(self, answer: str, *, closed: bool | None = None) -> Example:
        """The question with an answer, to be encoded; None closes it as the row's own."""
        return Example(
            self.question,
            answer,
            self.opening,
            closed=self.closed if closed is None else closed,
            history=self.history,
            is_text=self.is_text,
            is_question=self.is_question,
        )


@dataclass(frozen=True)
class Suite:
    """Sets of questions with the answers that were to be forgotten or kept.

    Raises:
        UsageError: A set holds fewer than two rows, or some rows with and some without perturbed
            answers.

    Example:
        >>> Suite(forget=[Row("Who wrote it?", "Ann."), Row("When?", "In 1950.")]).groups().keys()
        dict_keys(['forget'])
    """

    forget: Sequence[Row]
    retain: Sequence[Row] | None = None
    real_authors: Sequence[Row] | None = None
    """This set and the next one ask for general knowledge, as multiple-choice questions."""
    world_facts: Sequence[Row] | None = None
    holdout: Sequence[Row] | None = None
    """Rows like those of the forget set that no model was trained on, for membership inference."""
    retain_logs: Sequence[Record] | None = None
    """The records of a model trained without the forget set, evaluated on this suite."""
    notes: tuple[str, ...] = ()
    """Sentences that the user should see."""

    def __post_init__(self) -> None:
        for name, rows in self.groups().items():
            if len(rows) < 2:
                raise UsageError(
                    f"the set {name} must hold at least 2 rows for a confidence interval, but got "
                    f"{len(rows)}."
                )
            lacking = [row.question for row in rows if not row.perturbed_answers]
            if name != "holdout" and 0 < len(lacking) < len(rows):
                raise UsageError(
                    f"every row of the set {name} or none must have perturbed answers, but "
                    f"{lacking[0]!r} has none."
                )

    def groups(self) -> dict[str, Sequence[Row]]:
        """The sets that are there, by name."""
        sets = {
            "forget": self.forget,
            "retain": self.retain,
            "real_authors": self.real_authors,
            "world_facts": self.world_facts,
            "holdout": self.holdout,
        }
        return {name: rows for name, rows in sets.items() if rows is not None}


def load_suite(
    forget: Sets,
    *,
    retain: Sets | None = None,
    holdout: Data | None = None,
    retain_logs: Path | str | None = None,
    limit: int | None = None,
) -> Suite:
    """Reads the data that a model was unlearned with, given as to MOLLMTrainer.

    Of PKU-SafeRLHF the forget set is the unsafe responses, the retain set the safe ones. Rows with
    question, answer and perturbed_answer, a list of wrong answers, allow the truth ratio. A
    question with several answers is asked once; its first answer is scored, and a reply is compared
    with the nearest one. Running
    text is asked for its continuation: of its first 400 words half are the question, and half the
    answer.

    Args:
        forget: What was to be forgotten.
        retain: What was to be retained.
        holdout: Rows like those of the forget set that no model was trained on.
        retain_logs: The folder or examples.jsonl of a retain-only model's evaluation, or
            open-unlearning's TOFU_EVAL.json of it.
        limit: How many rows of each set to take, from its beginning, and of each of several sets
            of a role; None for all.

    Raises:
        UsageError: A file cannot be read, or its rows are not those of a known schema.

    Example:
        >>> from mollm.data.files import sample_path
        >>> suite = load_suite(sample_path("authors-forget.jsonl"), limit=4)
        >>> len(suite.forget), len(suite.forget[0].perturbed_answers)
        (4, 3)
    """
    _check_limit(limit)
    notes: list[str] = []

    def read(source: Sets, role: data.Role) -> tuple[Row, ...]:
        sets = [
            [
                record
                for record in records_of(one, role)
                if record.answer in record.extra.get(data.ACCEPTED, [record.answer])[:1]
            ]
            for one in named_sets(source, role).values()
        ]
        rows = [
            [_row(record, (_WRONG, _PARAPHRASED), required=False) for record in records]
            for records in sets
        ]
        asked = [_asked_once(some) for some in rows]
        twice = sum(map(len, rows)) - sum(map(len, asked))
        if twice:
            notes.append(
                f"{twice} of {sum(map(len, rows))} {role} answers share their question with an "
                "earlier one: it is asked once, its first answer is scored, and a reply is "
                "compared with the nearest."
            )
        return tuple(row for some in asked for row in some[:limit])

    suite = Suite(
        forget=read(forget, "forget"),
        retain=None if retain is None else read(retain, "retain"),
        holdout=None if holdout is None else read(holdout, "forget"),
        notes=tuple(notes),
    )
    return _with_logs(suite, retain_logs)


def _asked_once(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of one question as one, unless it has wrong answers to be told apart."""
    found: dict[Any, list[Row]] = {}
    for place, row in enumerate(rows):
        alone = row.is_text or row.opening or row.perturbed_answers
        found.setdefault(place if alone else (row.question, row.history), []).append(row)
    return [same[0] if len(same) == 1 else _with_all_answers(same) for same in found.values()]


def _with_all_answers(rows: Sequence[Row]) -> Row:
    answers = (text for row in rows for text in (row.accepted_answers or (row.answer,)))
    return replace(rows[0], accepted_answers=tuple(dict.fromkeys(answers)))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 2:
        raise UsageError(f"limit must be at least 2, but got {limit}.")


def load_tofu(
    folder: Path | str,
    *,
    forget_split: str = "forget10",
    retain_logs: Path | str | None = None,
    limit: int | None = None,
) -> Suite:
    """Reads the sets of TOFU (arXiv 2401.06121) from a folder with its files, or from the hub.

    The files are .jsonl, .json or .parquet; they, or the configs of the data set on the hub,
    are named {forget_split}_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed and, where it is there, holdout10 or the like, of the size of the forget
    set. A row holds question, answer, the list perturbed_answer and, in the first two,
    paraphrased_answer.

    Args:
        folder: Where the files are, or a name on the hub, such as locuslab/TOFU.
        forget_split: "forget01", "forget05" or "forget10".
        retain_logs: The folder or examples.jsonl of a retain-only model's evaluation, or
            open-unlearning's TOFU_EVAL.json of it.
        limit: How many rows of each file to take, from its beginning; None for all.

    Raises:
        UsageError: A file is missing or a row is not as above.
    """
    _check_limit(limit)
    find = _finder(folder)

    def read(name: str, *fields: str) -> tuple[Row, ...]:
        found = find(name)
        if found is None:
            raise UsageError(
                f"data must be a folder with {name}.jsonl, but {folder} has none: take the files "
                f"of the data set {_ON_HUB}, or name that."
            )
        records = data.load_records(found[0], role="retain", schema="tofu", config=found[1])
        return tuple(_row(record, fields, required=True) for record in records[:limit])

    holdout = forget_split.replace("forget", "holdout")
    suite = Suite(
        forget=read(f"{forget_split}_perturbed", _WRONG, _PARAPHRASED),
        retain=read("retain_perturbed", _WRONG, _PARAPHRASED),
        real_authors=read("real_authors_perturbed", _WRONG),
        world_facts=read("world_facts_perturbed", _WRONG),
        holdout=read(holdout) if find(holdout) is not None else None,
    )
    return _with_logs(suite, retain_logs)


def _with_logs(suite: Suite, path: Path | str | None) -> Suite:
    return suite if path is None else replace(suite, retain_logs=load_logs(path, suite.groups()))


def load_logs(path: Path | str, groups: Mapping[str, Sequence[Row]]) -> tuple[Record, ...]:
    """The logs of a retain-only model, of ours or of open-unlearning.

    Args:
        path: The folder or examples.jsonl of its evaluation, or open-unlearning's TOFU_EVAL.json.
        groups: The rows of the sets that they are about, by name.

    Raises:
        UsageError: There are no such logs, or open-unlearning's are about other rows.
    """
    file = eval_file(user_path(path))
    return read_records(path) if file is None else read_eval(file, groups)


_Finder = Callable[[str], tuple[str, str | None] | None]
"""From the name of a set to its source and config, None where there is none."""


def _finder(folder: Path | str) -> _Finder:
    path = user_path(folder)
    if not path.exists() and str(folder).count("/") == 1:
        return lambda name: (str(folder), name)

    def find(name: str) -> tuple[str, None] | None:
        files = (path / f"{name}{ending}" for ending in _ENDINGS)
        return next(((str(file), None) for file in files if file.is_file()), None)

    return find


def _row(record: data.Record, fields: Sequence[str], *, required: bool) -> Row:
    found = {name: record.extra.get(name) for name in fields}
    absent = next((name for name, value in found.items() if not value), None)
    if required and absent is not None:
        raise UsageError(
            f"{record.place} must have the field {absent}, but it has none: use the files that "
            "TOFU names *_perturbed."
        )
    other, wrong = found.get(_PARAPHRASED), found.get(_WRONG)
    question, answer = _halves(record) if record.is_text else (record.prompt, record.answer)
    return Row(
        question,
        answer,
        str(other) if other else None,
        tuple(wrong or ()),
        tuple(record.extra.get(data.ACCEPTED, ())),
        record.history,
        record.is_text,
        str(record.extra[_REWORDED]) if _REWORDED in record.extra else None,
        record.opening,
        record.closed,
        record.is_question,
    )


def _halves(record: data.Record) -> tuple[str, str]:
    """The beginning of a text, and as many words that go on from there.

    Of a text in a language without spaces, they are characters.
    """
    words = re.findall(r"\s*\S+", record.answer)
    if len(words) < 2 or any(len(word.strip()) > _LONGEST_WORD for word in words):
        words = re.findall(r"\s*\S", record.answer)
    words = words[:_WORDS]
    if len(words) < 2:
        raise UsageError(
            f"{record.place}: the field {record.answer_field} must hold at least two characters, "
            f"for the model is asked how the text goes on, but got {record.answer!r}: remove the "
            "row."
        )
    half = len(words) // 2
    return "".join(words[:half]), "".join(words[half:])
