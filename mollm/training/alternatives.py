"""Alternative answers to what is to be forgotten, for methods that prefer these.

They come from the data's column `alternate`, from texts that ship, or from the original model, see
`mollm.methods.method`. Every row to forget, also of the sets to evaluate on, gets one; a record
with several makes as many rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mollm.data.chat import ChatFormat, Tokens, context_of
from mollm.data.encoding import Encoded, encode_records
from mollm.data.files import sample_path
from mollm.data.records import ALTERNATE, Record
from mollm.data.sets import TrainingData, of_role
from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.evaluation.generation import MAX_NEW_TOKENS, generate_replies
from mollm.system.folders import replace_text

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
    data: TrainingData, chat: ChatFormat, *, refusals: bool, seed: int, max_length: int
) -> TrainingData:
    """The data with alternatives from its column `alternate`, or from the refusals that ship.

    Raises:
        UsageError: A row to forget has no such column, or is running text without a question.
    """
    texts = refusal_texts()

    def answers(name: str, records: Sequence[Record]) -> list[list[str]]:
        if refusals:
            drawn = random.Random(f"{seed} {name}")
            return [[drawn.choice(texts)] for _ in records]
        return [_given(record) for record in records]

    return _with_answers(data, chat, answers, max_length)


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
    sharded: bool,
) -> TrainingData:
    """The data with alternatives that the model makes up, or with those of its column `alternate`.

    What was made is kept in `folder`, for a run that resumes and for the reader. The first process
    asks the model.

    Args:
        data: The sets of a run.
        model: The original.
        chat: The format of its tokenizer.
        folder: Where a file `alternatives-….jsonl` is, or will be.
        samples: Answers for each row.
        seed: Of the draws.
        max_length: The most tokens of a row.
        of: What identifies the model.
        sharded: Whether processes are to hold parts of the model.

    Raises:
        UsageError: A row is running text, the model's context is too short or its answer blank, or
            the model is to be cut into parts.
    """

    def answers(name: str, records: Sequence[Record]) -> list[list[str]]:
        if all(ALTERNATE in record.extra for record in records):
            return [_given(record) for record in records]
        _refuse_text(records)
        if sharded:
            raise UsageError(
                "rows to forget must have a column alternate where processes hold parts of the "
                "model, which then makes up no answers, but some have none: add it."
            )
        made: list[list[str]] | None = None
        with processes.raise_on_all_ranks():
            if processes.rank() == 0:
                identity = json.dumps([of, data.facts[name]["sha256"], samples, seed])
                digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
                path = folder / f"alternatives-{digest}.jsonl"
                made = _kept(path, records) or _asked(
                    model, chat, records, samples, seed, max_length
                )
                _write(path, records, made)
        found: list[list[str]] | None = processes.all_gather(made)[0]
        assert found is not None, "the first process has them"
        return found

    return _with_answers(data, chat, answers, max_length)


def refusal_texts() -> list[str]:
    """The texts that ship, each of which says that the answer is not known."""
    return sample_path("refusals.txt").read_text(encoding="utf-8").splitlines()


def _with_answers(
    data: TrainingData,
    chat: ChatFormat,
    answers: Callable[[str, Sequence[Record]], list[list[str]]],
    max_length: int,
) -> TrainingData:
    encoded = dict(data.encoded)
    for name, known in data.encoded.items():
        if of_role(name) == "forget":
            records = data.records[name]
            _refuse_text(records)
            encoded[name] = _paired(known, records, answers(name, records), chat, max_length)
    return replace(data, encoded=encoded)


def _paired(
    known: Encoded,
    records: Sequence[Record],
    answers: Sequence[Sequence[str]],
    chat: ChatFormat,
    max_length: int,
) -> Encoded:
    rows: list[Tokens] = []
    origins: list[int] = []
    for row, place in zip(known.rows, known.origins, strict=True):
        others = [replace(records[place], answer=text, closed=True) for text in answers[place]]
        for other in encode_records(others, chat, max_length=max_length).rows:
            rows.append(replace(row, alternative=other))
            origins.append(place)
    return replace(known, rows=rows, origins=origins)


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
    questions = [REQUEST.format(question=r.prompt, answer=r.answer) for r in records]
    longest = max(len(chat.encode_prompt(question).ids) for question in questions)
    room = context_of(model.config) - longest
    if room < 1:
        raise UsageError(
            f"the model must have a context of more than {longest} tokens to make up answers, but "
            f"has {longest + room}: shorten the rows, or add a column {ALTERNATE}."
        )
    made: list[list[str]] = [[] for _ in records]
    # Half of a row at most, so that a question has its place.
    most = int(max(1, min(room, MAX_NEW_TOKENS, max_length // 2)))
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


def _kept(path: Path, records: Sequence[Record]) -> list[list[str]] | None:
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[ALTERNATE] for row in rows] if len(rows) == len(records) else None


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
