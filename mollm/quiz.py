"""Asks a chat model questions and reads what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mollm.chat import ChatFormat, collate
from mollm.facts import Question
from mollm.models import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    complete: bool
    """Whether the model ended its turn before the limit on new tokens."""

    def __str__(self) -> str:
        return self.text if self.complete else f"{self.text} …"


@dataclass(frozen=True)
class Score:
    """Replies to a list of questions, and which of them are right."""

    questions: tuple[Question, ...]
    replies: tuple[Reply, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """For each question whether its reply is right."""
        pairs = zip(self.questions, self.replies, strict=True)
        return tuple(question.is_answered_by(reply.text) for question, reply in pairs)

    @property
    def accuracy(self) -> float:
        """The share of right replies; NaN when nothing was asked."""
        return sum(self.right) / len(self.right) if self.right else float("nan")

    def only(self, subjects: Sequence[str]) -> Score:
        """The score over the questions on `subjects`, in that order."""
        at = {question.subject: i for i, question in enumerate(self.questions)}
        rows = [at[subject] for subject in subjects]
        return Score(tuple(self.questions[i] for i in rows), tuple(self.replies[i] for i in rows))

    def known(self) -> list[str]:
        """The subjects of the questions that were answered right."""
        pairs = zip(self.questions, self.right, strict=True)
        return [question.subject for question, right in pairs if right]


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    chat: ChatFormat,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 40,
) -> list[Reply]:
    """Greedy answers to `texts`, in their order.

    Args:
        model: A causal language model.
        chat: The format of its tokenizer.
        texts: Questions.
        max_new_tokens: Where an answer is cut off.
        batch_size: Questions that are answered together, padded on the left.
    """
    replies: list[Reply] = []
    for start in range(0, len(texts), batch_size):
        rows = [chat.encode_prompt(text) for text in texts[start : start + batch_size]]
        batch = collate(rows, chat.pad_id, side="left").to(model.device)
        with autocast(model.device):
            written = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=chat.pad_id,
                eos_token_id=chat.end_id,
            )
        answers = written[:, batch.input_ids.shape[1] :].tolist()
        replies += [_read(chat, answer) for answer in answers]
    return replies


def quiz(model: PreTrainedModel, chat: ChatFormat, questions: Sequence[Question]) -> Score:
    """Asks all `questions` and scores the replies."""
    replies = ask(model, chat, [question.text for question in questions])
    return Score(tuple(questions), tuple(replies))


def _read(chat: ChatFormat, ids: list[int]) -> Reply:
    complete = chat.end_id in ids
    if complete:
        ids = ids[: ids.index(chat.end_id)]  # type: ignore[arg-type]
    text: str = chat.tokenizer.decode(ids, skip_special_tokens=True)
    return Reply(" ".join(text.split()), complete)
