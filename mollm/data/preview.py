"""What a run trains on, as it trains on it: the rows themselves, read back from their ids."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.data.chat import IGNORE_INDEX, ChatFormat, Tokens
from mollm.data.records import Record, substance
from mollm.data.sets import TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = 0.1
"""Below this likelihood of a token, an answer counts as not known."""


@dataclass(frozen=True)
class Piece:
    """A part of a row's text."""

    text: str
    carries_loss: bool
    special: bool
    """Whether it is special tokens, such as those around a turn."""


@dataclass(frozen=True)
class ShownRow:
    """One row, token for token what the model is trained on."""

    place: str
    """The file and the line."""
    pieces: tuple[Piece, ...]
    tokens: int
    loss_tokens: int
    cut: bool
    """Whether its prompt lost its beginning, to fit into max_length."""

    @property
    def text(self) -> str:
        """The whole text, special tokens included."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def loss_text(self) -> str:
        """The part that carries the loss."""
        return "".join(piece.text for piece in self.pieces if piece.carries_loss)


@dataclass(frozen=True)
class ShownSet:
    """One set of a run."""

    source: str
    sha256: str
    records: int
    rows: int
    """More than records where long texts were cut into windows."""
    tokens: tuple[int, int, int]
    """Of a row: least, median, most."""
    loss_tokens: tuple[int, int, int]
    """Those of them that carry a loss."""
    cut: tuple[str, ...]
    """Places of the records whose prompts lost their beginning."""
    duplicates: tuple[str, ...]
    """Places of the records that say what an earlier one of the set says."""
    also_retained: tuple[str, ...]
    """Of the forget set: places of the records that the retain set holds too."""
    shown: tuple[ShownRow, ...]


@dataclass(frozen=True)
class Preview:
    """The sets of a run by name, and how they are written.

    Made by `mollm.preview` and `MOLLMTrainer.preview`.
    """

    sets: dict[str, ShownSet]
    chat: dict[str, Any]
    """What the text depends on besides data and tokenizer: the hash of the template, its options,
    the system prompt, and the date that stands in every row where the template writes one."""
    end: str | None
    """The token that ends an answer, and carries a loss."""
    max_length: int
    notes: tuple[str, ...]
    likelihoods: tuple[tuple[str, float], ...] | None = None
    """The place of each forget record that the model was asked for, and exp(-L) of its answer, L
    the mean negative log-likelihood of a token; None where it was not asked."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """Places of forget records whose answers the model does not know: nothing to forget."""
        return tuple(place for place, p in self.likelihoods or () if p < KNOWN)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "unknown": self.unknown}


def preview_of(data: TrainingData, chat: ChatFormat, max_length: int, rows: int = 2) -> Preview:
    """Looks at the data of a run.

    Args:
        data: What is trained on.
        chat: The format that it was encoded with.
        max_length: The most tokens of a row.
        rows: How many of each set are shown.
    """
    retained = {substance(record) for n in data.named("retain") for record in data.records[n]}
    to_forget = data.named("forget")
    sets = {}
    for name, records in data.records.items():
        encoded = data.encoded[name]
        keys = [substance(record) for record in records]
        cut = set(encoded.cut)
        sets[name] = ShownSet(
            source=_short(data.facts[name]["source"]),
            sha256=data.facts[name]["sha256"],
            records=len(records),
            rows=len(encoded.rows),
            tokens=_spread([len(row.ids) for row in encoded.rows]),
            loss_tokens=_spread([_loss_tokens(row) for row in encoded.rows]),
            cut=tuple(place_of(records[i]) for i in encoded.cut),
            duplicates=_repeated(records, keys),
            also_retained=tuple(
                place_of(record)
                for record, key in zip(records, keys, strict=True)
                if key in retained and name in to_forget
            ),
            shown=tuple(
                ShownRow(
                    place_of(records[origin]),
                    pieces_of(row, chat.tokenizer),
                    len(row.ids),
                    _loss_tokens(row),
                    origin in cut,
                )
                for row, origin in list(zip(encoded.rows, encoded.origins, strict=True))[:rows]
            ),
        )
    end = None if chat.end_id is None else chat.tokenizer.convert_ids_to_tokens(chat.end_id)
    return Preview(sets, chat.identity, end, max_length, data.notes)


def pieces_of(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
    """The text of a row, cut where a loss or special tokens begin or end."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [
        (label != IGNORE_INDEX, token in special)
        for token, label in zip(row.ids, row.labels, strict=True)
    ]
    pieces, end = [], 0
    for (carries_loss, is_special), run in groupby(kinds):
        start, end = end, end + len(list(run))
        pieces.append(Piece(_text(row.ids, start, end, tokenizer), carries_loss, is_special))
    return tuple(pieces)


def _text(ids: Sequence[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What some tokens add to the text before them: decoded alone, some lose a space."""

    def decode(some: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            some, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        # A letter of several bytes counts where it ends.
        return text if len(some) == len(ids) else text.rstrip("\ufffd")

    before, whole = decode(ids[:start]), decode(ids[:end])
    return whole[len(before) :] if whole.startswith(before) else decode(ids[start:end])


def _loss_tokens(row: Tokens) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels)


def _spread(counts: Sequence[int]) -> tuple[int, int, int]:
    return min(counts), int(statistics.median(counts)), max(counts)


def _repeated(records: Sequence[Record], keys: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for record, key in zip(records, keys, strict=True):
        if seen[key]:
            found.append(place_of(record))
        seen[key] += 1
    return tuple(found)


def place_of(record: Record) -> str:
    """Where a record stands within its set."""
    return f"{record.unit} {record.row}" if record.row else "a record"


def _short(source: str) -> str:
    return Path(source).name if "/" in source and Path(source).exists() else source
