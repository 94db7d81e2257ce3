"""What a model answers when it is asked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mollm.data.chat import ChatFormat, Example, Tokens, collate, ends_of
from mollm.errors import UsageError
from mollm.models.forward import in_evaluation_mode
from mollm.system.parsing import reason_of
from mollm.system.precision import autocast, computing_in
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 200
"""As in open-unlearning."""
_TRIED = 32
"""Tokens of a reply by which a generation config is found to be what makes it fail."""


def check_sizes(**sizes: int) -> None:
    """Refuses options, by name, of which there must be one at least.

    Raises:
        UsageError: One is less.
    """
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but got {value}.")


def generate_replies(
    model: PreTrainedModel,
    chat: ChatFormat,
    questions: Sequence[str | Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    sampled: bool = False,
    done: Done = quietly,
) -> list[Reply]:
    """Replies to `questions`, in their order.

    Questions of like length are answered together. A reply is as the model wrote it, but for the
    space around an answer to a question, and a thought that comes before it.

    Args:
        model: A causal language model; its training mode is put back at the end.
        chat: The format of its tokenizer.
        questions: What to ask, each in a conversation of its own; of an example all but the answer.
        max_new_tokens: Where a reply is cut off.
        batch_size: Questions that are answered together.
        sampled: Whether tokens are drawn from the model's distribution as it is, by Torch's global
            generator, or the likeliest ones are taken.
        done: Called with the number of questions of each batch.

    Raises:
        UsageError: max_new_tokens or batch_size is less than 1, or a question has tokens that the
            model has no embeddings for.
    """
    check_sizes(max_new_tokens=max_new_tokens, batch_size=batch_size)
    with in_evaluation_mode(model):
        return ask(
            model,
            chat,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sampled=sampled,
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


def ask(
    model: PreTrainedModel,
    chat: ChatFormat,
    texts: Sequence[str | Example],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 40,
    sampled: bool = False,
    done: Done = quietly,
) -> list[Reply]:
    """Answers to `texts`, in their order; those of like length are asked together.

    The model is asked with what precedes an answer in a row to train on. A reply ends at any token
    that ends a turn by the chat template, the tokenizer or the model's generation config.

    Args:
        model: A causal language model.
        chat: The format of its tokenizer.
        texts: Questions, or examples whose answers are left out.
        max_new_tokens: Where an answer is cut off.
        batch_size: Questions that are answered together, padded on the left; of a model that then
            answers otherwise, as recurrent ones do, each is answered alone.
        sampled: As for `generate_replies`.
        done: Called with the number of questions of each batch.
    """
    rows = [chat.encode_prompt(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        chat.refuse_unknown(row, f"the question {_example(text).question[:60]!r}")
    return ask_tokens(
        model,
        chat,
        rows,
        plain=[chat.is_plain(_example(text)) for text in texts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampled=sampled,
        done=done,
    )


@torch.no_grad()
def ask_tokens(
    model: PreTrainedModel,
    chat: ChatFormat,
    rows: Sequence[Tokens],
    *,
    plain: Sequence[bool] | None = None,
    max_new_tokens: int,
    batch_size: int,
    sampled: bool = False,
    done: Done = quietly,
) -> list[Reply]:
    """Answers to rows that end where an answer begins; see `ask`.

    Args:
        plain: Whether the answer to each row goes on with a text, and keeps the space around it.
    """
    # A generation config of the model's own may cut the distribution short.
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else {}
    stops = chat.stop_ids | ends_of(getattr(model, "generation_config", None))
    plain = plain or [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    replies: dict[int, Reply] = {}
    if batch_size > 1 and len(rows) > 1 and not answers_alike_in_company(model):
        batch_size = 1
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        batch = collate([rows[place] for place in places], chat.pad_id, side="left")
        batch = batch.to(model.device)
        asked = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "max_new_tokens": max_new_tokens,
            "do_sample": sampled,
            **drawn,
            "num_beams": 1,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "pad_token_id": chat.pad_id,
            "eos_token_id": sorted(stops) or None,
        }
        if chat.format.stop:
            asked["stopping_criteria"] = [_stop_words(chat, batch.input_ids.shape[1])]
        with autocast(model.device):
            written = written_by(model, asked)
        answers = written[:, batch.input_ids.shape[1] :].tolist()
        replies |= {
            p: _read(chat, a, stops, plain[p]) for p, a in zip(places, answers, strict=True)
        }
        done(len(places))
    return [replies[place] for place in range(len(rows))]


@torch.no_grad()
def answers_alike_in_company(model: PreTrainedModel) -> bool:
    """Whether rows of a batch that is padded on the left are answered as each is alone.

    Found by a try, then known for the model's dtype; if not, the log says why, once. Recurrent
    models, and some whose positions are learned, take padding for tokens whatever the mask says;
    some mix the states of rows up.
    """
    reasons: dict[torch.dtype, str] = vars(model).setdefault("_mollm_asked_alone", {})
    if model.dtype in reasons:
        return not reasons[model.dtype]
    try:
        apart = _apart_in_company(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that wants other inputs
        if not _answers_alone(model):
            return False  # it is no matter of padding: what is asked of it next says what it is
        reason = f"a padded batch fails with it ({reason_of(error, 200)})"
    else:
        if not math.isfinite(apart):
            return False  # nothing is known of a model whose weights are broken at the moment
        alike = apart < (1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2)
        reason = "" if alike else f"padding before a row changes its logits by {apart:.1%}"
    reasons[model.dtype] = reason
    if reason:
        name = getattr(model, "name_or_path", "") or type(model).__name__
        logger.warning("The model %s is asked one row at a time: %s.", name, reason)
    return not reason


def _answers_alone(model: PreTrainedModel) -> bool:
    try:
        _first_logits(model, _some_ids(model)[:1], None)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return True


def _some_ids(model: PreTrainedModel) -> Tensor:
    """[2, 5]"""
    ids = torch.arange(1, 11, device=model.device).view(2, 5)
    ids %= model.get_input_embeddings().weight.shape[0]
    return ids


def _apart_in_company(model: PreTrainedModel) -> float:
    """By how much, of the largest logit, those of two rows differ from what each has alone."""
    ids = _some_ids(model)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    together = _first_logits(model, ids, mask)
    alone = _first_logits(model, ids[:1], mask[:1]), _first_logits(model, ids[1:, 2:], None)
    return float((together - torch.cat(alone)).abs().max() / together.abs().max())


def _first_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[B, 3, V]: of three tokens to come, when the same ones are written whatever is likeliest."""
    from transformers import GenerationConfig

    ends = ends_of(getattr(model, "generation_config", None))
    written = next(token for token in range(len(ends) + 1) if token not in ends)
    with computing_in("float32"), autocast(model.device):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            prefix_allowed_tokens_fn=lambda *_: [written],
            generation_config=GenerationConfig(  # the model's own may not work
                min_new_tokens=3,
                max_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            ),
        )
    logits: Tensor = torch.stack(output.logits, 1).double()
    return logits.masked_fill(logits.isinf(), 0)  # of ids that no token has


def written_by(
    model: PreTrainedModel, asked: Mapping[str, Any], streamer: Any | None = None
) -> Tensor:
    """What `model.generate` writes.

    Args:
        model: The model.
        asked: The arguments of `generate`.
        streamer: Another, which hears of the tokens.

    Raises:
        UsageError: The model's own generation config makes it fail.
    """
    try:
        heard = {} if streamer is None else {"streamer": streamer}
        written: Tensor = model.generate(**asked, **heard)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a config can make of it
        few = min(asked["max_new_tokens"], _TRIED)  # nobody waits for the rest
        _refuse_generation_config(model, {**asked, "max_new_tokens": few}, error)
        raise
    return written


def _refuse_generation_config(
    model: PreTrainedModel, asked: Mapping[str, Any], error: Exception
) -> None:
    """Says that the model's generation config is to blame, if all goes well without it."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.generate(**asked)
    except Exception:
        return
    finally:
        model.generation_config = own
    raise UsageError(
        f"the generation config of the model {model.name_or_path} must suit `generate` of "
        f"transformers, but that fails with it: {reason_of(error)}: correct its "
        "generation_config.json, or remove it."
    ) from error


def _example(text: str | Example) -> Example:
    return text if isinstance(text, Example) else Example(text, "")


def _stop_words(chat: ChatFormat, start: int) -> Callable[..., Tensor]:
    """A criterion of `generate`: a row is done once it holds a word that ends a reply.

    Args:
        chat: The format with the words.
        start: How many tokens a row of the batch is asked with.
    """
    # A token has a character or more, but for letters of several bytes.
    most = 4 * max(len(word) for word in chat.format.stop) + 4

    def done(ids: Tensor, scores: object, **_: object) -> Tensor:
        tails = chat.tokenizer.batch_decode(ids[:, start:][:, -most:].tolist())
        found = [chat.format.until_stop(tail)[1] for tail in tails]
        return torch.tensor(found, device=ids.device)

    return done


def _read(chat: ChatFormat, ids: list[int], stops: frozenset[int], plain: bool) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text, thinking = chat.read_reply(ids[:end])
    text, stopped = chat.format.until_stop(text)
    return Reply(text if plain else text.strip(), end is not None or stopped, thinking)
