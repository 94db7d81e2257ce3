"""What a model answers when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mollm.data.chat import ChatFormat, Example, collate, ends_of
from mollm.errors import UsageError
from mollm.models.forward import in_evaluation_mode
from mollm.system.precision import autocast
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 200
"""As in open-unlearning."""


def generate_replies(
    model: PreTrainedModel,
    chat: ChatFormat,
    questions: Sequence[str | Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    done: Done = quietly,
) -> list[Reply]:
    """Greedy replies to `questions`, in their order, padded on the left.

    Questions of like length are answered together. Every run of white space in a reply becomes one
    space, and a thought that comes before the answer is left out.

    Args:
        model: A causal language model; its training mode is put back at the end.
        chat: The format of its tokenizer.
        questions: What to ask, each in a conversation of its own; of an example all but the answer.
        max_new_tokens: Where a reply is cut off.
        batch_size: Questions that are answered together.
        done: Called with the number of questions of each batch.

    Raises:
        UsageError: max_new_tokens or batch_size is less than 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but got {value}.")
    with in_evaluation_mode(model):
        return ask(
            model,
            chat,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            done=done,
        )


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    complete: bool
    """Whether the model ended its turn before the limit on new tokens."""
    thinking: bool = False
    """Whether the limit came within a thought, so that there is no answer."""

    def __str__(self) -> str:
        return self.text if self.complete else f"{self.text} …"


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    chat: ChatFormat,
    texts: Sequence[str | Example],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 40,
    done: Done = quietly,
) -> list[Reply]:
    """Greedy answers to `texts`, in their order; those of like length are asked together.

    The model is asked with what precedes an answer in a row to train on. A reply ends at any token
    that ends a turn by the chat template, the tokenizer or the model's generation config.

    Args:
        model: A causal language model.
        chat: The format of its tokenizer.
        texts: Questions, or examples whose answers are left out.
        max_new_tokens: Where an answer is cut off.
        batch_size: Questions that are answered together, padded on the left.
        done: Called with the number of questions of each batch.
    """
    stops = chat.stop_ids | ends_of(getattr(model, "generation_config", None))
    rows = [chat.encode_prompt(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    replies: dict[int, Reply] = {}
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        batch = collate([rows[place] for place in places], chat.pad_id, side="left")
        batch = batch.to(model.device)
        with autocast(model.device):
            written = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=chat.pad_id,
                eos_token_id=sorted(stops) or None,
            )
        answers = written[:, batch.input_ids.shape[1] :].tolist()
        replies |= {p: _read(chat, a, stops) for p, a in zip(places, answers, strict=True)}
        done(len(places))
    return [replies[place] for place in range(len(rows))]


def _read(chat: ChatFormat, ids: list[int], stops: frozenset[int]) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text, thinking = chat.read_reply(ids[:end])
    return Reply(" ".join(text.split()), end is not None, thinking)
