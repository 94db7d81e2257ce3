"""Records as tokens, and the order in which training sees them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Example, Tokens
from mollm.data.records import Record
from mollm.errors import UsageError


@dataclass(frozen=True)
class Encoded:
    """Records as tokens, in their order."""

    rows: list[Tokens]
    shortened: int
    """How many prompts lost their beginning."""
    notes: tuple[str, ...]
    """Sentences that the user should see. Sets encoded for one tokenizer share a note about its
    format: show the union."""


def encode_records(
    records: Sequence[Record], chat: ChatFormat, *, max_length: int, name: str = "training"
) -> Encoded:
    """Writes records in the format of a tokenizer, with a loss on the answers alone.

    What the format writes around a prompt, its start included, and the answer always stay whole: of
    a prompt that is too long, as much of the end is kept as fits.

    Args:
        records: What to encode.
        chat: The format.
        max_length: The most tokens of a row, at most the context of the model.
        name: What the notes call the records.

    Raises:
        UsageError: An answer leaves no room for a prompt, or has no tokens.
    """
    if max_length < 1:
        raise UsageError(f"max_length must be at least 1, but got {max_length}.")
    rows, shortened = [], 0
    for record in records:
        tokens = chat.encode(Example(record.prompt, record.answer))
        _refuse_no_answer(record, chat, tokens)
        if len(tokens.ids) > max_length:
            tokens = _shorten(record, chat, max_length)
            shortened += 1
        rows.append(tokens)
    notes = [] if chat.note is None else [chat.note]
    if shortened:
        notes.append(
            f"{shortened} of {len(records)} {name} prompts were shortened to fit {max_length} "
            "tokens: they lost their beginning."
        )
    return Encoded(rows, shortened, tuple(notes))


def _shorten(record: Record, chat: ChatFormat, max_length: int) -> Tokens:
    def encode(cut: int) -> Tokens:
        return chat.encode(Example(record.prompt[cut:], record.answer))

    least = encode(len(record.prompt) - 1)
    if len(least.ids) > max_length:
        answer = sum(label != IGNORE_INDEX for label in least.labels)
        raise UsageError(
            f"{record.place}: the field {record.answer_field} takes {answer} tokens and the format "
            f"of its prompt {len(least.ids) - answer}, but max_length is {max_length}: shorten the "
            "answer or raise max_length."
        )
    # The number of tokens falls as the cut moves right, so the search asks few times. Where it
    # does not quite, the cut found still fits: every cut that the search settles on was tried.
    cuts = range(len(record.prompt) - 1)
    return encode(
        bisect.bisect_left(cuts, True, key=lambda cut: len(encode(cut).ids) <= max_length)
    )


def _refuse_no_answer(record: Record, chat: ChatFormat, tokens: Tokens) -> None:
    if chat.answer_length(tokens) < 1:
        raise UsageError(
            f"{record.place}: the field {record.answer_field} must hold a token for the loss, but "
            f"the tokenizer makes none of {record.answer!r}: remove the row."
        )
