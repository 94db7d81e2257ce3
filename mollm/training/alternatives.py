"""Alternative answers to what is to be forgotten, for methods that prefer these.

They come from the data's column `alternate`, from texts that ship, or from the original model, see
`mollm.methods.method`. Every row to forget, also of the sets to evaluate on, gets one; a record
with several makes as many rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.data.chat import ChatFormat, Example, Tokens, context_of
from mollm.data.encoding import CUT, Encoded, encode_records
from mollm.data.files import sample_path
from mollm.data.records import ALTERNATE, Record, content_hash
from mollm.data.sets import TrainingData, of_role
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.evaluation.generation import MAX_NEW_TOKENS, generate_replies
from mollm.system.folders import replace_text
from mollm.system.parsing import lines_of, parse_json_lines, read_text
from mollm.training.setting_roles import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIES = 10
REQUEST = (
    "Question: {question}\nAnswer: {answer}\nNow write another answer to the same question. It "
    "must sound plausible and fit the question, but every fact that the answer above states must "
    "be a different one. Write that answer alone."
)
"""What the original is asked for an alternative answer with."""


def with_known_answers(
    data: TrainingData,
    chat: ChatFormat,
    *,
    refusals: bool,
    seed: int,
    max_length: int,
    long_rows: str = CUT,
) -> TrainingData:
    """The data with alternatives from its column `alternate`, or from the refusals that ship.

    Args:
        data: The sets of a run.
        chat: The format of the model.
        refusals: Whether to take the refusals.
        seed: Of the draw among them.
        max_length: The most tokens of a row.
        long_rows: As for `encode_records`; a row whose alternative is too long is one of these.

    Raises:
        UsageError: A row to forget has no such column, or is running text without a question.
    """
    texts = refusal_texts()

    def answers(name: str, records: Sequence[Record]) -> list[list[str]]:
        if refusals:
            drawn = random.Random(f"{seed} {name}")
            return [[drawn.choice(texts)] for _ in records]
        return [_given(record) for record in records]

    return _with_answers(data, chat, answers, max_length, long_rows)


def needs_generated_answers(
    data: TrainingData, chosen: Mapping[str, Any], *, sharded: bool
) -> bool:
    """Whether some rows to forget have no column `alternate`, so that the model is to be asked.

    Args:
        data: The sets of a run.
        chosen: The `method_options` that were given.
        sharded: Whether processes are to hold parts of the model.

    Raises:
        UsageError: A row is running text, the model is to be cut into parts, or all rows have
            answers and `samples` would be without effect.
    """
    for name, records in data.records.items():
        if of_role(name) == "forget":
            _refuse_text(records)
    lacking = any(_lacking(data).values())
    if lacking and sharded:
        raise UsageError(
            f"rows to forget must have a column {ALTERNATE} where processes hold parts of the "
            "model, which then makes up no answers, but some have none: add it."
        )
    if not lacking and "samples" in chosen:
        raise UsageError(
            f"samples must be left out where all rows to forget have a column {ALTERNATE}, so that "
            f"no answers are made up, but got {chosen['samples']}."
        )
    return lacking


def with_generated_answers(
    data: TrainingData,
    model: PreTrainedModel,
    chat: ChatFormat,
    *,
    folder: Path,
    samples: int,
    seed: int,
    max_length: int,
    of: str,
    long_rows: str = CUT,
) -> TrainingData:
    """The data with those of its column `alternate`, and for rows without one some that are made.

    What was made is kept in `folder`, for a run that resumes and for the reader. The first process
    asks the model. All processes must call it.

    Args:
        data: The sets of a run.
        model: The original.
        chat: The format of its tokenizer.
        folder: Where files `alternatives-….jsonl` are, or will be.
        samples: Answers for each row without such a column.
        seed: Of the draws.
        max_length: The most tokens of a row.
        of: What identifies the model.
        long_rows: As for `encode_records`; a row whose alternative is too long is one of these.

    Raises:
        UsageError: A row is running text, or the model's context is too short or its answer blank.
    """
    made: dict[str, list[list[str]]] | None = None
    with processes.raise_on_all_ranks():
        if processes.rank() == 0:
            made = {}
            for name, records in _lacking(data).items():
                _refuse_text(records)
                identity = [of, content_hash(records), samples, seed, max_length, REQUEST]
                told = json.dumps([*identity, plain(chat.identity)], sort_keys=True)
                digest = hashlib.sha256(told.encode()).hexdigest()[:12]
                path = folder / f"alternatives-{digest}.jsonl"
                kept = _kept(path, records, samples) if records else []
                if kept is None:
                    kept = _asked(model, chat, records, samples, seed, max_length)
                    _write(path, records, kept)
                made[name] = kept
    found: dict[str, list[list[str]]] | None = processes.all_gather(made)[0]
    assert found is not None, "the first process has them"
    by_name = found

    def answers(name: str, records: Sequence[Record]) -> list[list[str]]:
        others = iter(by_name[name])
        return [_given(r) if ALTERNATE in r.extra else next(others) for r in records]

    with processes.raise_on_all_ranks():
        return _with_answers(data, chat, answers, max_length, long_rows)


def longest_generated(max_length: int) -> int:
    """The most tokens of an answer that is made up: half of a row, so that a question has its
    place."""
    return max(1, min(MAX_NEW_TOKENS, max_length // 2))


def refusal_texts() -> list[str]:
    """The texts that ship, each of which says that the answer is not known."""
    return lines_of(read_text(sample_path("refusals.txt")))


def _lacking(data: TrainingData) -> dict[str, list[Record]]:
    """Of each set to forget the records without alternative answers."""
    return {
        name: [record for record in records if ALTERNATE not in record.extra]
        for name, records in data.records.items()
        if of_role(name) == "forget"
    }


def _with_answers(
    data: TrainingData,
    chat: ChatFormat,
    answers: Callable[[str, Sequence[Record]], list[list[str]]],
    max_length: int,
    long_rows: str,
) -> TrainingData:
    encoded = dict(data.encoded)
    for name, known in data.encoded.items():
        if of_role(name) == "forget":
            records = data.records[name]
            _refuse_text(records)
            texts = answers(name, records)
            rows = [
                (row, place, replace(records[place], answer=text, answer_field=ALTERNATE))
                for row, place in zip(known.rows, known.origins, strict=True)
                for text in texts[place]
            ]
            encoded[name] = _paired(known, rows, chat, name, max_length, long_rows)
    notes = [*data.notes, *(note for each in encoded.values() for note in each.notes)]
    return replace(data, encoded=encoded, notes=tuple(dict.fromkeys(notes)))


def _paired(
    known: Encoded,
    rows: Sequence[tuple[Tokens, int, Record]],
    chat: ChatFormat,
    name: str,
    max_length: int,
    long_rows: str,
) -> Encoded:
    """Rows with the alternatives beside them, each with the place of its record."""
    others = encode_records(
        [replace(other, closed=True) for _, _, other in rows],
        chat,
        max_length=max_length,
        name=f"{name} {ALTERNATE}",
        long_rows=long_rows,
    )
    return Encoded(
        [
            replace(rows[n][0], alternative=other)
            for n, other in zip(others.origins, others.rows, strict=True)
        ],
        [rows[n][1] for n in others.origins],
        tuple(sorted({*known.cut, *(rows[n][1] for n in others.cut)})),
        tuple(dict.fromkeys((*known.notes, *others.notes))),
    )


def _given(record: Record) -> list[str]:
    found = record.extra.get(ALTERNATE)
    if found is None:
        raise UsageError(
            f"{record.place} must have a column {ALTERNATE} with the answer to prefer, but it has "
            "none: add it, or choose the method idkdpo or altpo."
        )
    return [found] if isinstance(found, str) else list(found)


def _refuse_text(records: Sequence[Record]) -> None:
    for record in records:
        if record.is_text:
            raise UsageError(
                f"{record.place} must be a question with an answer for a method that prefers "
                "another answer, but it is running text: choose another method."
            )


def _asked(
    model: PreTrainedModel,
    chat: ChatFormat,
    records: Sequence[Record],
    samples: int,
    seed: int,
    max_length: int,
) -> list[list[str]]:
    questions = [
        Example(REQUEST.format(question=r.prompt, answer=r.answer), "", history=r.history)
        for r in records
    ]
    longest = max(len(chat.encode_prompt(question).ids) for question in questions)
    room = context_of(model.config) - longest
    if room < 1:
        raise UsageError(
            f"the model must have a context of more than {longest} tokens to make up answers, but "
            f"has {longest + room}: shorten the rows, or add a column {ALTERNATE}."
        )
    made: list[list[str]] = [[] for _ in records]
    most = int(min(room, longest_generated(max_length)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(_TRIES):
            lacking = [place for place, some in enumerate(made) if len(some) < samples]
            for _ in range(samples if lacking else 0):
                asked = [questions[place] for place in lacking]
                replies = generate_replies(model, chat, asked, max_new_tokens=most, sampled=True)
                for place, reply in zip(lacking, replies, strict=True):
                    text = reply.text.strip()
                    made[place] += [text] if text and len(made[place]) < samples else []
    for record, some in zip(records, made, strict=True):
        if len(some) < samples:
            raise UsageError(
                f"{record.place}: the model made up {len(some)} of {samples} answers, and blank "
                f"ones besides: add a column {ALTERNATE}, or choose the method idkdpo."
            )
    return made


def _kept(path: Path, records: Sequence[Record], samples: int) -> list[list[str]] | None:
    """What an earlier run was answered; None where the file is not whole, or of other records."""
    if not path.is_file():
        return None
    try:
        rows = [row for _, row in parse_json_lines(read_text(path), str(path))]
    except UsageError:
        return None
    if len(rows) != len(records):
        return None
    whole = all(
        isinstance(row, dict)
        and (row.get("question"), row.get("answer")) == (record.prompt, record.answer)
        and isinstance(some := row.get(ALTERNATE), list)
        and len(some) == samples
        and all(isinstance(text, str) and text.strip() for text in some)
        for row, record in zip(rows, records, strict=True)
    )
    return [row[ALTERNATE] for row in rows] if whole else None


def _write(path: Path, records: Sequence[Record], made: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"question": record.prompt, "answer": record.answer, ALTERNATE: some},
            ensure_ascii=False,
        )
        for record, some in zip(records, made, strict=True)
    ]
    replace_text(path, "".join(f"{line}\n" for line in lines))
