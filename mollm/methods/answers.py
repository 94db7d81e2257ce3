"""The answer tokens of a batch as a loss sees them: hidden states, a head, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mollm.data.chat import IGNORE_INDEX, Batch
from mollm.models.forward import answer_hidden_states, at_answers, head_weights, kept_output
from mollm.models.logits import logit_transform
from mollm_ops import linear_cross_entropy
from mollm_ops.operands import IDENTITY, LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LossDenominators:
    """What the means of a step divide by, where several micro-batches make one batch."""

    tokens: int | Tensor
    """Answer tokens of the whole batch."""
    sequences: int


@dataclass(frozen=True)
class AnswerTokens:
    """The N answer tokens of B sequences, before they meet the head.

    Log-likelihoods come from `linear_cross_entropy` with a loss per token: no logits [N, V] of the
    whole batch exist at any time.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [N]
    sequence: Tensor  # [N], in [0, B)
    count: int
    """B."""
    totals: LossDenominators | None = None
    """Of the whole batch, where this is a micro-batch: a loss then is this one's share of the mean,
    so that shares add up to the loss of the whole."""
    transform: LogitTransform = IDENTITY
    """From the head's outputs to logits."""
    alternative: AnswerTokens | None = None
    """Other answers to the same questions, sequence for sequence, where the batch has them."""
    states: Tensor | None = None  # [N, H]
    """What an inner block returns at these tokens' places, where that was asked for."""

    @property
    def head_options(self) -> dict[str, Any]:
        """Of the head, beside its weight, for the linear losses of `mollm_ops`."""
        return {
            "bias": self.bias,
            "logit_scale": self.transform.scale,
            "softcap": self.transform.softcap,
        }

    @property
    def tokens(self) -> int | Tensor:
        """What a mean over tokens divides by."""
        return len(self.target) if self.totals is None else self.totals.tokens

    @property
    def sequences(self) -> int:
        """What a mean over sequences divides by."""
        return self.count if self.totals is None else self.totals.sequences

    def log_likelihoods(self) -> Tensor:
        """[B]: log π(y | x) = Σ_t log p(y_t | x, y_<t) of every answer."""
        losses = self.token_losses()
        return -losses.new_zeros(self.count).index_add(0, self.sequence, losses)

    def token_losses(self) -> Tensor:
        """[N]: -log p(y_t | x, y_<t) of every answer token."""
        return linear_cross_entropy(
            self.hidden, self.weight, self.target, **self.head_options, reduction="none"
        )

    def cross_entropy(self) -> Tensor:
        """Σ_t -log p(y_t | x, y_<t) / tokens of the batch, or of the whole that it is a part of."""
        return linear_cross_entropy(
            self.hidden,
            self.weight,
            self.target,
            **self.head_options,
            normalizer=self.tokens,
        )

    def lengths(self) -> Tensor:
        """[B]: |y|, the number of answer tokens."""
        return torch.bincount(self.sequence, minlength=self.count)

    def firsts(self) -> Tensor:
        """[N]: whether a token is the first one of its answer."""
        places = torch.arange(len(self.sequence), device=self.sequence.device)
        first = places.new_full((self.count,), len(places))
        first = first.scatter_reduce(0, self.sequence, places, "amin")
        return places == first[self.sequence]


def answers_of(
    model: PreTrainedModel,
    batch: Batch,
    totals: LossDenominators | None = None,
    *,
    layer: int | None = None,
) -> AnswerTokens:
    """The answers of a batch of texts, from one forward pass, and one of its alternative answers.

    Args:
        model: A causal language model.
        batch: The texts.
        totals: Of the whole batch, where this is a part of it.
        layer: The block, from 0, whose output `AnswerTokens.states` is to hold.
    """
    with kept_output(model, layer) as seen:
        hidden, target = answer_hidden_states(model, batch)
    weight, bias = head_weights(model)
    other = batch.alternative
    return AnswerTokens(
        hidden,
        weight,
        bias,
        target,
        sequences_of(batch),
        len(batch.labels),
        totals=totals,
        transform=logit_transform(model),
        alternative=None if other is None else answers_of(model, other, totals),
        states=None if layer is None else at_answers(seen[0], batch),
    )


def sequences_of(batch: Batch) -> Tensor:
    """[N]: the row of the batch that each answer token stands in."""
    counted = batch.labels[:, 1:] != IGNORE_INDEX
    rows = torch.arange(len(counted), device=counted.device)[:, None].expand_as(counted)
    return rows[counted]
