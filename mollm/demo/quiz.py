"""Asks a chat model questions and reads what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mollm.data.chat import ChatFormat
from mollm.demo.facts import Question
from mollm.evaluation.generation import Reply, ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER = 80
"""Questions in a batch: they are short, and more of them share the cost of a token."""


@dataclass(frozen=True)
class Score:
    """Replies to a list of questions, and which of them are right."""

    questions: tuple[Question, ...]
    replies: tuple[Reply, ...]

    @property
    def pairs(self) -> list[tuple[Question, Reply]]:
        """The questions with their replies."""
        return list(zip(self.questions, self.replies, strict=True))

    @property
    def right(self) -> tuple[bool, ...]:
        """For each question whether its reply is right."""
        return tuple(question.is_answered_by(reply.text) for question, reply in self.pairs)

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


def quiz(
    model: PreTrainedModel, chat: ChatFormat, questions: Sequence[Question], **options: Any
) -> Score:
    """Asks all `questions`, with the options of `ask`, and scores the replies."""
    texts = [question.text for question in questions]
    replies = ask(model, chat, texts, **({"batch_size": _TOGETHER} | options))
    return Score(tuple(questions), tuple(replies))


def quizzes(
    model: PreTrainedModel, chat: ChatFormat, groups: Mapping[str, Sequence[Question]]
) -> dict[str, Score]:
    """The score of each group; all are asked in one go."""
    replies = iter(quiz(model, chat, [q for group in groups.values() for q in group]).replies)
    return {
        name: Score(tuple(group), tuple(islice(replies, len(group))))
        for name, group in groups.items()
    }
