"""Chat-formatted examples as token ids, with a loss on the answer tokens alone.

Works with any tokenizer. One without a chat template gets the plain format

    Question: {question}
    Answer: {answer}

Labels come from where the answer stands in the text, never from the value of an id: in many
models the padding token is the token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mollm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_MARK = "\N{BLACK SQUARE}"


@dataclass(frozen=True)
class Example:
    """One question with the answer that carries the loss."""

    question: str
    answer: str
    opening: str = ""
    """Words with which the assistant's turn has already begun: context without a loss."""
    closed: bool = True
    """Whether the turn ends after the answer; if so, the token that ends it carries a loss too."""


@dataclass(frozen=True)
class Tokens:
    """An example as ids; a label is the id itself where it carries a loss, else IGNORE_INDEX."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Padded examples."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 1 for a token, 0 for padding
    labels: Tensor  # [B, T]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )


class ChatFormat:
    """Writes questions and answers the way a model's tokenizer wants them.

    Raises:
        UsageError: The tokenizer's chat template fails.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None
        self._start_ids = self._find_start()
        self.end_id: int | None = self._find_turn_end()
        """The token that ends the assistant's turn."""
        self.pad_id: int = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        """The id that fills a batch; masked, so any id would do."""

    @property
    def note(self) -> str | None:
        """A sentence for the user where there is no template to write by."""
        if self.has_template:
            return None
        name = self.tokenizer.name_or_path or "of this model"
        return (
            f"The tokenizer {name} has no chat template, so rows are written as "
            f"{self.prompt('…')!r} and the answer."
        )

    def prompt(self, question: str) -> str:
        """The text that ends where the assistant's answer begins."""
        if not self.has_template:
            return f"Question: {question}\nAnswer:"
        return self._render([{"role": "user", "content": question}], add_generation_prompt=True)

    def encode_prompt(self, question: str) -> Tokens:
        """A question that waits for its answer; no token carries a loss."""
        ids = self._start_ids + self._ids(self.prompt(question))
        return Tokens(ids, [IGNORE_INDEX] * len(ids))

    def encode(self, example: Example) -> Tokens:
        """Question and answer; the tokens that hold characters of the answer carry a loss."""
        before = self.prompt(example.question)
        if example.opening:
            before += self._joint + example.opening
        answer = example.answer.strip()
        glue = self._joint if not example.opening else " "
        ids, is_answer = self._split(before, glue + answer)
        labels = [i if mine else IGNORE_INDEX for i, mine in zip(ids, is_answer, strict=True)]
        if example.closed and self.end_id is not None:
            ids, labels = [*ids, self.end_id], [*labels, self.end_id]
        return Tokens(self._start_ids + ids, [IGNORE_INDEX] * len(self._start_ids) + labels)

    def answer_length(self, tokens: Tokens) -> int:
        """How many tokens a closed answer has, without the one that ends the turn."""
        counted = sum(label != IGNORE_INDEX for label in tokens.labels)
        return counted - (self.end_id is not None)

    def _render(self, turns: list[dict[str, str]], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except TemplateError as error:
            raise UsageError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path} must write a "
                f"question and an answer, but it fails: {error}: put another into its "
                "chat_template."
            ) from error
        return text

    @property
    def _joint(self) -> str:
        return "" if self.has_template else " "

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _split(self, before: str, answer: str) -> tuple[list[int], list[bool]]:
        # The text is tokenised in one piece, as the model would write it itself: some tokenizers
        # would put a word-start mark of their own before a lone answer.
        if not self.tokenizer.is_fast:
            head, tail = self._ids(before), self._ids(answer)
            return head + tail, [False] * len(head) + [True] * len(tail)
        encoded = self.tokenizer(
            before + answer, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [end for _, end in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [end > len(before) for end in ends]

    def _find_start(self) -> list[int]:
        """Ids that stand before every text; a chat template writes its own."""
        if self.has_template or self.tokenizer.bos_token_id is None:
            return []
        ids: list[int] = self.tokenizer("x")["input_ids"]
        return ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []

    def _find_turn_end(self) -> int | None:
        """The first token that the template writes after an answer, or the end-of-text token."""
        end: int | None = self.tokenizer.eos_token_id
        if not self.has_template:
            return end
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
        after = self._ids(self._render(turns).rpartition(_MARK)[2].lstrip())
        special = set(self.tokenizer.all_special_ids)
        return after[0] if after and after[0] in special else end


def collate(rows: Sequence[Tokens], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pads `rows` to one length on the given side.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one example, but got none.")
    width = max(len(row.ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return values + padding if side == "right" else padding + values

    return Batch(
        input_ids=torch.tensor([pad(row.ids, pad_id) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row.ids), 0) for row in rows]),
        labels=torch.tensor([pad(row.labels, IGNORE_INDEX) for row in rows]),
    )
