"""The same questions asked in other ways: what a prompt alone may bring back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mollm.data.conversations import ASSISTANT, USER, Turn
from mollm.evaluation.suite import Row

SHOTS = 3
REWORDINGS = (
    "Please answer this question: {}",
    "I am preparing a quiz, and one of its questions is: {}",
    "{} Answer from memory, in one sentence.",
    'A friend asked me: "{}" What should I tell them?',
)
_NEEDED = 0.9


def in_other_words(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows in each of several wordings: their own where all have one, and REWORDINGS.

    Empty where a row is running text, which nobody asks for.
    """
    if any(row.is_text for row in rows):
        return {}
    wordings: dict[str, list[Row]] = {}
    own = [(row, row.paraphrased_question) for row in rows]
    if all(text for _, text in own):
        wordings["paraphrased_question"] = [replace(row, question=text or "") for row, text in own]
    for form in REWORDINGS:
        wordings[form.format("…")] = [
            replace(row, question=form.format(row.question)) for row in rows
        ]
    return wordings


def with_first_half(rows: Sequence[Row]) -> list[Row]:
    """The rows whose answers have several words, each with the first half of them given."""
    found = []
    for row in rows:
        words = row.answer.split()
        if row.is_text or len(words) < 2:
            continue
        half = len(words) // 2
        opening = f"{row.opening} {' '.join(words[:half])}".strip()
        found.append(replace(row, opening=opening, answer=" ".join(words[half:])))
    return found


def after_examples(rows: Sequence[Row], shown: Sequence[Row]) -> list[Row]:
    """The rows, each after a conversation in which the questions of `shown` were answered.

    Empty where a row is running text.
    """
    if any(row.is_text for row in (*rows, *shown)):
        return []
    turns: tuple[Turn, ...] = ()
    for row in shown:
        answer = f"{row.opening} {row.answer}".strip()
        turns += (Turn(USER, row.question), Turn(ASSISTANT, answer))
    return [replace(row, history=(*row.history, *turns)) for row in rows]


def gives_away(reply: str, row: Row) -> bool:
    """Whether a reply holds an answer: as it is, or nine in ten of the words that the question
    does not hold, in any order.

    Of several accepted answers one is enough. Case does not count.

    Example:
        >>> row = Row("Where was Ann born?", "Ann was born in Oslo.")
        >>> gives_away("In Oslo, I think.", row), gives_away("Ann was born in Rome.", row)
        (True, False)
    """
    said, whole = set(_words(reply)), _spaced(reply)
    asked = set(_words(f"{row.question} {row.opening}"))
    for answer in row.accepted_answers or (row.answer,):
        words = set(_words(answer))
        telling = words - asked or words
        if _spaced(answer) in whole or (telling and _holds(said, telling)):
            return True
    return False


def _holds(said: set[str], telling: set[str]) -> bool:
    return len(said & telling) >= _NEEDED * len(telling)


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
