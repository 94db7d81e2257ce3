"""What the model answers to some questions of a run, before it and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mollm.data.chat import ChatFormat, context_of
from mollm.data.encoding import example_of
from mollm.data.records import ROLES, Record
from mollm.data.sets import TrainingData
from mollm.evaluation.generation import generate_replies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST = 64
"""Tokens of a reply."""


class ReplySamples:
    """Asks the same questions before and after: the first of each set, of those to evaluate on
    where there are such.

    Args:
        model: The model that trains, with its adapter if it has one.
        chat: The format of its tokenizer.
        data: The sets of a run.
        count: How many questions of each set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        data: TrainingData,
        count: int,
    ) -> None:
        self._model, self._chat = model, chat
        context = context_of(model.config)
        self._asked = [
            (role, record)
            for role in ROLES
            for name in data.looked_at(role)
            for record in data.records[name][:count]
            if not record.is_text and self._length(record) + _LONGEST < context
        ]
        self._said: list[list[str]] = []

    def ask(self) -> None:
        """Asks the model as it is now."""
        if self._asked:
            replies = generate_replies(
                self._model,
                self._chat,
                [example_of(record) for _, record in self._asked],
                max_new_tokens=_LONGEST,
                batch_size=8,
            )
            self._said.append([str(reply) for reply in replies])

    def rows(self) -> list[dict[str, Any]]:
        """Question, answer and the first and the last reply; none where it was not asked twice."""
        if len(self._said) < 2:
            return []
        return [
            {
                "set": role,
                "question": record.prompt,
                "answer": record.answer,
                "before": before,
                "after": after,
            }
            for (role, record), before, after in zip(
                self._asked, self._said[0], self._said[-1], strict=True
            )
        ]

    def forget_all(self) -> None:
        """Begins anew."""
        self._said.clear()

    def _length(self, record: Record) -> int:
        return len(self._chat.encode_prompt(example_of(record)).ids)
