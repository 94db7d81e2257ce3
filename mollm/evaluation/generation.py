"""What a model answers when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mollm.chat import ChatFormat
from mollm.errors import UsageError
from mollm.models import in_evaluation_mode
from mollm.quiz import Reply, ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 200
"""As in open-unlearning."""


def generate_replies(
    model: PreTrainedModel,
    chat: ChatFormat,
    questions: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
) -> list[Reply]:
    """Greedy replies to `questions`, in their order, padded on the left.

    Questions of like length are answered together. Every run of white space in a reply becomes one
    space.

    Args:
        model: A causal language model; its training mode is put back at the end.
        chat: The format of its tokenizer.
        questions: What to ask, each in a conversation of its own.
        max_new_tokens: Where a reply is cut off.
        batch_size: Questions that are answered together.

    Raises:
        UsageError: max_new_tokens or batch_size is less than 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but got {value}.")
    order = sorted(range(len(questions)), key=lambda place: -len(questions[place]))
    with in_evaluation_mode(model):
        replies = ask(
            model,
            chat,
            [questions[place] for place in order],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    at = dict(zip(order, replies, strict=True))
    return [at[place] for place in range(len(questions))]
