"""A model asked with plain text, without a chat: how it goes on, and which choice is likelier.

Benchmarks that fix every character of their prompts are measured so. The tokenizer writes its own
start before a prompt. What is longer than the model's context loses its beginning, as in
lm-evaluation-harness; how many did is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from mollm.data.chat import (
    IGNORE_INDEX,
    Tokens,
    collate,
    context_of,
    ends_of,
    pad_id_of,
    vocabulary_of,
)
from mollm.data.encoding import cut_note
from mollm.errors import UsageError
from mollm.evaluation.generation import answers_alike_in_company, written_by
from mollm.evaluation.scores import TokenScores, score_rows
from mollm.methods import answers_of
from mollm.models.forward import in_evaluation_mode
from mollm.system.terminal import Done, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]


def unheard(text: str) -> None:
    """Where nobody listens to what is said."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The ids of a text, after the tokenizer's own start if `special`, and without an end."""
    found = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    ids = [int(i) for i in found]
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id else ids


def _ends_of_long(rows: Sequence[list[int]], room: float, what: str, say: Say) -> list[list[int]]:
    """The rows, those of more than `room` tokens without their beginning."""
    if room < 1:
        raise UsageError(
            f"{what} must have room for a token in the model's context, but what it writes fills "
            "that: take a model with a longer one."
        )
    cut = sum(len(ids) > room for ids in rows)
    if cut:
        say(cut_note(cut, len(rows), what, room))
    return [ids if len(ids) <= room else ids[-int(room) :] for ids in rows]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    special: bool = True,
    what: str = "prompts",
    say: Say = unheard,
    done: Done = quietly,
) -> list[str]:
    """What a model writes after each prompt, greedily, in their order.

    Args:
        model: A causal language model; its training mode is put back at the end.
        tokenizer: Its tokenizer.
        prompts: Texts; what special tokens stand in them are written out.
        max_new_tokens: Where a continuation is cut off.
        batch_size: Prompts of like length that are continued together.
        special: Whether the tokenizer adds its start; not where the prompts hold it.
        what: What the prompts are called where how many were shortened is said.
        say: Called with that sentence.
        done: Called with the number of prompts of each batch.

    Raises:
        UsageError: The context has no room for a prompt.
    """
    pad = pad_id_of(tokenizer, vocabulary_of(model.config))
    rows = [prompt_ids(tokenizer, prompt, special=special) for prompt in prompts]
    rows = _ends_of_long(rows, context_of(model.config) - max_new_tokens, what, say)
    ends = ends_of(getattr(model, "generation_config", None))
    stops = ends | {i for i in (tokenizer.eos_token_id,) if i is not None}
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    size = batch_size if answers_alike_in_company(model) else 1
    said: dict[int, str] = {}
    with in_evaluation_mode(model):
        for start in range(0, len(order), size):
            places = order[start : start + size]
            some = [Tokens(rows[p], [IGNORE_INDEX] * len(rows[p])) for p in places]
            batch = collate(some, pad, side="left").to(model.device)
            asked = {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "num_beams": 1,
                "pad_token_id": pad,
                "eos_token_id": sorted(stops) or None,
            }
            written = written_by(model, asked)
            for place, ids in zip(places, written[:, batch.input_ids.shape[1] :], strict=True):
                said[place] = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            done(len(places))
    return [said[place] for place in range(len(rows))]


def text_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    what: str = "texts",
    say: Say = unheard,
    done: Done = quietly,
) -> list[TokenScores]:
    """Scores of all tokens of each text but the first, in their order.

    Raises:
        UsageError: A text has a single token, or the output is not finite.
    """
    pad = pad_id_of(tokenizer, vocabulary_of(model.config))
    rows = _text_rows(model, tokenizer, texts, what, say)
    return score_rows(model, rows, pad_id=pad, batch_size=batch_size, done=done)


def _text_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    what: str,
    say: Say,
) -> list[Tokens]:
    """The texts, with a loss on all tokens but the first."""
    rows = [prompt_ids(tokenizer, text) for text in texts]
    for text, ids in zip(texts, rows, strict=True):
        if len(ids) < 2:
            raise UsageError(f"a text must have two tokens at least, but got {text!r}: remove it.")
    rows = _ends_of_long(rows, context_of(model.config), what, say)
    return [Tokens(ids, [IGNORE_INDEX, *ids[1:]]) for ids in rows]


def choice_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[str],
    *,
    batch_size: int = 16,
    what: str = "prompts",
    say: Say = unheard,
    done: Done = quietly,
) -> list[list[float]]:
    """log p(choice | prompt) of every choice after every prompt, as lm-evaluation-harness has it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: What precedes.
        choices: What may follow, with the space before it.
        batch_size: Rows that pass through the model together.
        what: What the prompts are called where how many were shortened is said, with each choice.
        say: Called with that sentence.
        done: Called with the number of rows of each batch.
    """
    known = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts for _ in choices]
    whole = [prompt_ids(tokenizer, prompt + choice) for prompt in prompts for choice in choices]
    rows = []
    for ids, count, kept in zip(
        whole, known, _ends_of_long(whole, context_of(model.config), what, say), strict=True
    ):
        labels = [IGNORE_INDEX] * count + ids[count:]
        rows.append(Tokens(kept, labels[-len(kept) :]))
    pad = pad_id_of(tokenizer, vocabulary_of(model.config))
    scored = score_rows(model, rows, pad_id=pad, batch_size=batch_size, done=done)
    sums = [float(each.log_probs.sum()) for each in scored]
    return [sums[start : start + len(choices)] for start in range(0, len(sums), len(choices))]


def gradient_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    what: str = "texts",
    say: Say = unheard,
    done: Done = quietly,
) -> list[float]:
    """‖∇θ L‖₂ of the mean negative log-likelihood L of each text, over all parameters.

    Gradients that parameters hold are put back.

    Raises:
        UsageError: A text has a single token, or a gradient is not finite.
    """
    pad = pad_id_of(tokenizer, vocabulary_of(model.config))
    rows = _text_rows(model, tokenizer, texts, what, say)
    wanted = [p for p in model.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in wanted]
    norms = []
    try:
        for p in wanted:
            p.requires_grad_(True)
        with in_evaluation_mode(model), torch.enable_grad():
            for row in rows:
                batch = collate([row], pad).to(model.device)
                loss = answers_of(model, batch).cross_entropy()
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
                total = sum(float(g.double().square().sum()) for g in grads if g is not None)
                if not math.isfinite(total):
                    raise UsageError(
                        "gradients must be finite, but one is not: has the model diverged?"
                    )
                norms.append(math.sqrt(total))
                done(1)
    finally:
        for p, trains in zip(wanted, before, strict=True):
            p.requires_grad_(trains)
    return norms
