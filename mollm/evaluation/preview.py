"""`preview`: what a run would train on, and which of it the model knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.data.chat import ChatFormat, context_of, ends_of, vocabulary_of
from mollm.data.encoding import CUT
from mollm.data.preview import Preview, place_of, preview_of
from mollm.data.prompt_format import FormatOption
from mollm.data.sets import TrainingData, read_data
from mollm.errors import UsageError
from mollm.evaluation.scores import score_rows
from mollm.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.data.sets import Sets

MOST_ASKED = 64
"""Of how many forget records the model's likelihood is computed."""


def preview(
    model: str | Path,
    forget: Sets,
    retain: Sets,
    *,
    evaluate: Mapping[str, Sets] | None = None,
    max_length: int = 1024,
    train_on_turns: str = "last",
    long_rows: str = CUT,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prompt_format: FormatOption = None,
    rows: int = 2,
    known: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Preview:
    """Shows what a run would train on: read, encoded and compared as MOLLMTrainer does it.

    Args:
        model: A model folder, a .gguf file or a hub name.
        forget: What to forget, as MOLLMTrainer takes it.
        retain: What to keep.
        evaluate: Sets "forget" and "retain", or one of them, to evaluate on.
        max_length: The most tokens of a row; less where the model's context is shorter.
        train_on_turns: "last" or "all" answers of a conversation carry a loss.
        long_rows: "cut" or "skip" rows that are too long.
        system_prompt: Of conversations that have none of their own.
        chat_template_kwargs: Options of the chat template.
        prompt_format: How prompts are written: "none" for plain text, "chat", a template, or
            options, see `mollm.data.prompt_format.PromptFormat`.
        rows: How many rows of each set to show.
        known: Whether to load the weights and compute the likelihood of the answers to forget, of
            the first 64 records.
        device: Where the model goes then.
        dtype: Of its weights there.

    Raises:
        UsageError: The run would be refused for its data or its tokenizer.

    Example:
        >>> from mollm import preview
        >>> shown = preview(model, "forget.jsonl", "retain.jsonl")  # doctest: +SKIP
        >>> shown.sets["forget"].shown[0].loss_text  # doctest: +SKIP
        'Paris.<|im_end|>'
    """
    if rows < 0:
        raise UsageError(f"rows must not be negative, but got {rows}.")
    config = loading.load_config(str(model))[0]
    source = loading.find_model(str(model))
    chat = ChatFormat(
        loading.load_tokenizer(source),
        template_kwargs=chat_template_kwargs,
        system_prompt=system_prompt,
        prompt_format=prompt_format,
        vocabulary=vocabulary_of(config),
        ends=ends_of(loading.load_generation_config(source)),
    )
    max_length = int(min(max_length, context_of(config)))
    data = read_data(forget, retain, evaluate, chat, max_length, train_on_turns, long_rows)
    found = preview_of(data, chat, max_length, rows)
    if not known:
        return found
    loaded, _ = loading.load(source, torch.device(device), dtype)
    return with_likelihoods(found, data, chat, loaded)


def with_likelihoods(
    found: Preview, data: TrainingData, chat: ChatFormat, model: PreTrainedModel
) -> Preview:
    """The preview with the model's likelihood of the answers to forget, of each set's first."""
    likelihoods = []
    for name in data.named("forget"):
        encoded, records = data.encoded[name], data.records[name]
        first = [encoded.origins.index(n) for n in sorted(set(encoded.origins))[:MOST_ASKED]]
        rows = [encoded.rows[i] for i in first]
        scores = score_rows(model, rows, pad_id=chat.pad_id, batch_size=8)
        likelihoods += [
            (place_of(records[encoded.origins[i]]), math.exp(-each.mean_nll))
            for i, each in zip(first, scores, strict=True)
        ]
    return replace(found, likelihoods=tuple(likelihoods))
