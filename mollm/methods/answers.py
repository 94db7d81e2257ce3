"""The answer tokens of a batch as a loss sees them: hidden states, a head, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mollm.chat import IGNORE_INDEX, Batch
from mollm.models import answer_states, head
from mollm_ops import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answers:
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

    def log_likelihoods(self) -> Tensor:
        """[B]: log π(y | x) = Σ_t log p(y_t | x, y_<t) of every answer."""
        losses = linear_cross_entropy(
            self.hidden, self.weight, self.target, bias=self.bias, reduction="none"
        )
        return -losses.new_zeros(self.count).index_add(0, self.sequence, losses)

    def lengths(self) -> Tensor:
        """[B]: |y|, the number of answer tokens."""
        return torch.bincount(self.sequence, minlength=self.count)


def answers_of(model: PreTrainedModel, batch: Batch) -> Answers:
    """The answers of a batch of texts, from one forward pass."""
    hidden, target = answer_states(model, batch)
    counted = batch.labels[:, 1:] != IGNORE_INDEX
    rows = torch.arange(len(counted), device=counted.device)[:, None].expand_as(counted)
    layer = head(model)
    return Answers(hidden, layer.weight, layer.bias, target, rows[counted], len(counted))
