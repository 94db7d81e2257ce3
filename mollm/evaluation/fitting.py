"""Questions that are too long for a model, by the rule that rows to train on follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mollm.data.chat import ChatFormat, Example
from mollm.data.encoding import SKIP, cut_note, shortened, skipped_note
from mollm.errors import UsageError
from mollm.evaluation.suite import Row


@dataclass(frozen=True)
class Fitted:
    """The rows of a set that a model is asked, each with the row that it was."""

    pairs: tuple[tuple[Row, Row], ...]
    """As it is given, and as it is asked."""
    notes: tuple[str, ...] = ()
    """Sentences that the user should see."""

    @property
    def asked(self) -> list[Row]:
        """What the model is asked."""
        return [asked for _, asked in self.pairs]


def fit(
    group: str,
    rows: Sequence[Row],
    chat: ChatFormat,
    context: float,
    *,
    reply: int = 0,
    with_choices: bool = False,
    long_rows: str,
) -> Fitted:
    """Makes rows fit into a model's context, with every answer that is scored and with a reply.

    Of a conversation the earliest turns are left out, of a question the beginning; of running text
    each half has half of the context at most. An answer stays whole.

    Args:
        group: The name of the set.
        rows: Its rows.
        chat: How they are written.
        context: The most tokens of the model.
        reply: Tokens that a reply may take; 0 where none is asked for.
        with_choices: Whether the other answers of a row are scored too.
        long_rows: "cut" as above, or "skip" to leave out rows that are too long.

    Raises:
        UsageError: An answer leaves no room for a question, or no two rows are left.
    """
    pairs, cut, skipped = [], 0, 0
    for row in rows:
        asked = _text_within(row, chat, context)

        def length(example: Example, row: Row = asked) -> int:
            texts = [row.answer, *(choices_of(row) if with_choices else ())]
            found = max(len(chat.encode(replace(example, answer=text)).ids) for text in texts)
            prompt = len(chat.encode_prompt(example).ids) + reply if reply else 0
            return max(found, prompt)

        example = asked.example("")
        if length(example) > context:
            if long_rows == SKIP:
                skipped += 1
                continue
            less = shortened(example, length, int(context))
            if less is None:
                raise UsageError(
                    f"every row of the set {group} must fit into the model's context of {context} "
                    f"tokens, but {row.question[:60]!r} takes {length(example)} with an answer or "
                    "a reply: shorten the answer, ask for fewer max_new_tokens, or leave such rows "
                    "out with long_rows: skip."
                )
            asked = replace(asked, question=less.question, history=less.history)
        cut += asked is not row
        pairs.append((row, asked))
    if len(pairs) < 2:
        raise UsageError(
            f"the set {group} must have two rows that fit into the model's context of {context} "
            f"tokens, but has {len(pairs)}: ask for fewer max_new_tokens, or say long_rows: cut."
        )
    notes = [cut_note(cut, len(rows), f"{group} prompts", context)] if cut else []
    notes += [skipped_note(skipped, len(rows), group, context)] if skipped else []
    return Fitted(tuple(pairs), tuple(notes))


def choices_of(row: Row) -> list[str]:
    """The right answer in the words of the wrong ones, and those."""
    return [row.paraphrased_answer or row.answer, *row.perturbed_answers]


def _text_within(row: Row, chat: ChatFormat, context: float) -> Row:
    """The row, of running text with an answer of half the context at most."""
    if not row.is_text or math.isinf(context):
        return row
    most = int(context) // 2
    if chat.answer_length(chat.encode(row.example(row.answer))) <= most:
        return row
    return replace(row, answer=chat.beginning(row.example(row.answer), most))
