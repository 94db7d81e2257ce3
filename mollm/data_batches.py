"""Records as tokens, and the order in which training sees them."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mollm.chat import IGNORE_INDEX, ChatFormat, Example, Tokens
from mollm.data import Record
from mollm.errors import UsageError

Row = TypeVar("Row")


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


class RowSampler(Generic[Row]):
    """Batches without end: every epoch shuffles the rows anew and visits each once.

    A batch that begins at the end of an epoch goes on in the next one, so that all batches have the
    same size and no row is dropped. The order depends on the rows' number, `seed` and `name`
    alone: however many processes share the batches, together they see the same ones.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        *,
        seed: int,
        name: str = "training",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Begins with the first epoch.

        Args:
            rows: What to draw from.
            batch_size: The rows of a batch, all processes together.
            seed: Decides the order.
            name: Gives samplers of the same seed orders of their own.
            rank: This process, from 0; it gets every batch's rank-th part.
            world_size: The number of processes.

        Raises:
            UsageError: There is no row, or the processes cannot share a batch evenly.
        """
        if not rows:
            raise UsageError(f"the {name} data must hold at least one row, but it holds none.")
        if not 0 <= rank < world_size:
            raise UsageError(
                f"rank must be at least 0 and less than world_size {world_size}, but got {rank}."
            )
        if batch_size < 1 or batch_size % world_size:
            raise UsageError(
                f"batch_size must be a positive multiple of the {world_size} processes, but got "
                f"{batch_size}."
            )
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._name = name
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self.epoch = 0
        """How often every row has been drawn."""
        self.index = 0
        """How many rows have been drawn since."""
        self._order = self._shuffled()

    def __iter__(self) -> Iterator[list[Row]]:
        return self

    def __next__(self) -> list[Row]:
        """This process's part of the next batch."""
        drawn = [self._draw() for _ in range(self._batch_size)]
        return [self._rows[i] for i in drawn[self._share]]

    def state_dict(self) -> dict[str, Any]:
        """The position, the same in every process."""
        return self._fixed() | {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; batch size and number of processes may be others than then.

        Raises:
            UsageError: The position is one in another order.
        """
        for key, value in self._fixed().items():
            if state.get(key) != value:
                raise UsageError(
                    f"{key} of the {self._name} data must be {state.get(key)} as in the "
                    f"checkpoint, but got {value}: resume with the same data and seed."
                )
        epoch, index = state["epoch"], state["index"]
        if not (epoch >= 0 and 0 <= index < len(self._rows)):
            raise UsageError(
                f"the position of the {self._name} data must lie within {len(self._rows)} rows, "
                f"but got epoch {epoch}, index {index}."
            )
        self.epoch, self.index = epoch, index
        self._order = self._shuffled()

    def _fixed(self) -> dict[str, Any]:
        return {"name": self._name, "seed": self._seed, "rows": len(self._rows)}

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._rows)))
        random.Random(f"{self._name} {self._seed} {self.epoch}").shuffle(order)
        return order

    def _draw(self) -> int:
        drawn = self._order[self.index]
        self.index += 1
        if self.index == len(self._rows):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled()
        return drawn


class PairSampler(Generic[Row]):
    """A batch to forget and one to retain at every step, each set at its own pace."""

    def __init__(self, forget: RowSampler[Row], retain: RowSampler[Row]) -> None:
        self.forget = forget
        self.retain = retain

    def __iter__(self) -> Iterator[tuple[list[Row], list[Row]]]:
        return self

    def __next__(self) -> tuple[list[Row], list[Row]]:
        """This process's part of the next two batches."""
        return next(self.forget), next(self.retain)

    def state_dict(self) -> dict[str, Any]:
        """Both positions."""
        return {"forget": self.forget.state_dict(), "retain": self.retain.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to two saved positions.

        Raises:
            UsageError: One of them is a position in another order.
        """
        self.forget.load_state_dict(state["forget"])
        self.retain.load_state_dict(state["retain"])
