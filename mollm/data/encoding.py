"""Records as tokens."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mollm.data.chat import TRAIN_ON_TURNS, ChatFormat, Example, Tokens
from mollm.data.conversations import ASSISTANT, SYSTEM, USER
from mollm.data.records import Record
from mollm.errors import UsageError

CUT, SKIP = LONG_ROWS = ("cut", "skip")
"""What becomes of rows that are too long."""
_SHORT = 16
"""Characters, more than most tokens have."""


@dataclass(frozen=True)
class Encoded:
    """Records as tokens, in their order."""

    rows: list[Tokens]
    """One a record, but of a long text one a window."""
    origins: list[int]
    """For each row the place of its record among those given."""
    cut: tuple[int, ...]
    """The places of the records whose prompts lost their beginning."""
    notes: tuple[str, ...]
    """Sentences that the user should see. Sets encoded for one tokenizer share a note about its
    format: show the union."""

    @property
    def shortened(self) -> int:
        """How many prompts lost their beginning."""
        return len(self.cut)


def check_long_rows(long_rows: str) -> None:
    """Refuses what is no rule for rows that are too long.

    Raises:
        UsageError: It is none of LONG_ROWS.
    """
    if long_rows not in LONG_ROWS:
        raise UsageError(f"long_rows must be {' or '.join(LONG_ROWS)}, but got {long_rows!r}.")


def encode_records(
    records: Sequence[Record],
    chat: ChatFormat,
    *,
    max_length: int,
    name: str = "training",
    train_on_turns: str = "last",
    long_rows: str = CUT,
) -> Encoded:
    """Writes records in the format of a tokenizer, with a loss on the answers alone.

    What the format writes around a prompt, its start included, and the answer always stay whole. Of
    a conversation that is too long the earliest turns are left out, after those of the system; of a
    prompt that is still too long, as much of the end is kept as fits. Running text is cut into
    windows, see `ChatFormat.encode_text`.

    Args:
        records: What to encode.
        chat: The format.
        max_length: The most tokens of a row, at most the context of the model.
        name: What the notes call the records.
        train_on_turns: "last" for a loss on the last answer of a conversation, or "all" for one on
            every answer.
        long_rows: "cut" as above, or "skip" to leave out rows that are too long, but for running
            text.

    Raises:
        UsageError: An answer leaves no room for a prompt, or has no tokens, or tokens that the
            model does not know; the format cannot write a conversation; or all answers are to carry
            a loss, and the data set says of one that it is to carry none.
    """
    if max_length < 1:
        raise UsageError(f"max_length must be at least 1, but got {max_length}.")
    if train_on_turns not in TRAIN_ON_TURNS:
        raise UsageError(
            f"train_on_turns must be one of {', '.join(TRAIN_ON_TURNS)}, but got "
            f"{train_on_turns!r}."
        )
    check_long_rows(long_rows)
    rows, origins, cut, lost, skipped = [], [], [], 0, 0
    for place, record in enumerate(records):
        if record.weightless and train_on_turns == "all":
            raise UsageError(
                f"{record.place}: {record.weightless} must not be 0 or false with train_on_turns: "
                "all, where every answer carries a loss, but it is: choose last, or split the "
                "conversation."
            )
        if record.is_text:
            some = chat.encode_text(record.answer, max_length)
        else:
            example = example_of(record)
            tokens = _encode(example, record, chat, train_on_turns)
            if len(tokens.ids) > max_length and long_rows == SKIP:
                skipped += 1
                continue
            if len(tokens.ids) > max_length:

                def encode(less: Example, record: Record = record) -> Tokens:
                    return _encode(less, record, chat, train_on_turns)

                less = shortened(example, lambda one: len(encode(one).ids), max_length)
                if less is None:
                    raise _too_long(example, record, chat, max_length, train_on_turns)
                tokens = encode(less)
                cut.append(place)
                lost += _answers_in(example) - _answers_in(less)
            some = [tokens]
        if not all(chat.answer_length(tokens) > 0 for tokens in some) or not some:
            raise UsageError(
                f"{record.place}: the field {record.answer_field} must hold a token for the loss, "
                f"but the tokenizer makes none of {record.answer!r}: remove the row."
            )
        for tokens in some:
            chat.refuse_unknown(tokens, record.place)
        rows += some
        origins += [place] * len(some)
    if not rows:
        raise UsageError(
            f"the {name} data must have a row of at most {max_length} tokens, but has none: raise "
            "max_length, or say long_rows: cut."
        )
    notes = [] if chat.note is None else [chat.note]
    if skipped:
        notes.append(skipped_note(skipped, len(records), name, max_length))
    if cut:
        notes.append(cut_note(len(cut), len(records), f"{name} prompts", max_length))
    if lost and train_on_turns == "all":
        notes.append(
            f"With it, {lost} earlier answers of the {name} conversations were left out, and carry "
            "no loss: raise max_length, or split the conversations."
        )
    return Encoded(rows, origins, tuple(cut), tuple(notes))


def cut_note(cut: int, total: int, what: str, max_length: float) -> str:
    """How many prompts or other texts were shortened, in a sentence."""
    return (
        f"{cut} of {total} {what} were shortened to fit {max_length} tokens: they lost their "
        "beginning."
    )


def skipped_note(skipped: int, total: int, name: str, max_length: float) -> str:
    """How many rows were left out, in a sentence."""
    return (
        f"{skipped} of {total} {name} rows were left out, for they take more than {max_length} "
        "tokens."
    )


def example_of(record: Record) -> Example:
    """What a record asks and answers, after what was said before."""
    return Example(
        record.prompt,
        record.answer,
        record.opening,
        record.closed,
        history=record.history,
        is_text=record.is_text,
        is_question=record.is_question,
    )


def _encode(example: Example, record: Record, chat: ChatFormat, on_turns: str) -> Tokens:
    try:
        return chat.encode(example, on_turns=on_turns)
    except UsageError as error:
        raise UsageError(f"{record.place}: {error}") from error


def shortened(
    example: Example, length: Callable[[Example], int], max_length: int
) -> Example | None:
    """The example with as much of what comes before its answer as fits: of a conversation without
    its earliest turns, after those of the system, and then without the beginning of its question.

    Args:
        example: What is too long.
        length: Its tokens, which fall as words are left out.
        max_length: The most of them.

    Returns:
        None where not even the last character of the question fits.
    """
    turns = example.history
    first = next((i for i, turn in enumerate(turns) if turn.role != SYSTEM), len(turns))
    kept = turns[:first]
    starts = [i for i in range(first + 1, len(turns)) if turns[i].role == USER]
    for start in [*starts, len(turns)] if first < len(turns) else []:
        less = replace(example, history=kept + turns[start:])
        if length(less) <= max_length:
            return less
    last = max(0, len(example.question) - 1)

    def without(cut: int) -> Example:
        return replace(example, question=example.question[cut:], history=kept)

    def fits(cut: int) -> bool:
        return length(without(cut)) <= max_length

    if not fits(last):
        return None
    # The number of tokens falls as the cut moves right, so the search asks few times. Where it
    # does not quite, the cut found still fits: every cut that the search settles on was tried.
    # It begins with the end alone, lest every try reads all of a long text.
    width = _SHORT * max_length
    while width < last and fits(last - width):
        width *= 2
    first_cut = max(0, last - width)
    return without(bisect.bisect_left(range(last), True, lo=first_cut, key=fits))


def _too_long(
    example: Example, record: Record, chat: ChatFormat, max_length: int, on_turns: str
) -> UsageError:
    turns = tuple(turn for turn in example.history if turn.role == SYSTEM)
    bare = replace(example, question=example.question[-1:], history=turns)
    least = _encode(bare, record, chat, on_turns)
    answer = chat.answer_length(least) + least.closed
    return UsageError(
        f"{record.place}: the field {record.answer_field} takes {answer} tokens and the format "
        f"of its prompt {len(least.ids) - answer}, but max_length is {max_length}: shorten the "
        "answer, raise max_length, or leave such rows out with long_rows: skip."
    )


def _answers_in(example: Example) -> int:
    return sum(turn.role == ASSISTANT for turn in example.history)
