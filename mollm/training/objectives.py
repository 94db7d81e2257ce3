"""The three losses of unlearning as one module, for a plain loop and for engines that wrap modules.

DistributedDataParallel and FSDP2 gather parameters and average gradients around the forward of the
module that they wrap. A loss that reads the head's weight outside of it meets a part of that
weight, or a gradient that nobody averages; so all losses are computed inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mollm.data.chat import IGNORE_INDEX, Batch, Tokens
from mollm.distributed.sharding import answer_tokens
from mollm.methods import (
    ForgetLoss,
    LossDenominators,
    RetainLoss,
    answers_of,
    unlearning_cross_entropy,
)
from mollm.models.dropout import without_dropout
from mollm.models.forward import answer_hidden_states, in_evaluation_mode
from mollm.models.logits import logit_transform
from mollm.training.reference_model import Reference
from mollm_ops import linear_ce_kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objectives(nn.Module):
    """A loss on what is to be forgotten, KL to the original model, and cross-entropy.

        forget   forget_loss on the batch to forget, the unlearning cross-entropy of most methods
        kl       KL(original ‖ model) on the batch to retain
        retain   cross-entropy on the batch to retain, from the same forward
        relearn  cross-entropy on a batch to forget: what an attacker minimises

    Losses read hidden states of answer tokens alone; no tensor [tokens, V] exists at any time.
    The model computes without dropout, whatever mode it is in, and is left in that mode: at the
    first step model and original are the same, and so KL and its gradient are zero.

    Args:
        model: A causal language model whose logits are its head's outputs, or these scaled or
            capped, see `mollm.models.logits`.
        reference: Its original.
        forget_loss: What to minimise on the batch to forget.
        retain_loss: What to minimise on the batch to retain in place of the cross-entropy.
        layer: The block whose output those losses read, if any; the reference must be made for it.

    Raises:
        UsageError: The losses do not fit the model, see `mollm.models.logits.check_logits`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mollm import CopyReference
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> losses = Objectives(model, CopyReference(model))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> found = losses(forget=batch, retain=batch)
        >>> sorted(found), found["kl"].item() < 1e-6  # no distance before the first step
        (['forget', 'kl', 'retain'], True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: Reference,
        forget_loss: ForgetLoss = unlearning_cross_entropy,
        retain_loss: RetainLoss | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        logit_transform(model)
        self.model = model
        self.reference = reference
        self.forget_loss = forget_loss
        self.retain_loss = retain_loss
        self.layer = layer

    def forward(
        self,
        forget: Batch | Mapping[str, Tensor] | None = None,
        retain: Batch | Mapping[str, Tensor] | None = None,
        totals: tuple[LossDenominators, LossDenominators] | None = None,
        relearn: Batch | Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the batches that are given: "forget", "kl" and "retain", or "relearn".

        Args:
            forget: input_ids, attention_mask and labels, [B, T] each; a label is the token itself
                where it is part of an answer, else -100.
            retain: The same of the answers to keep.
            totals: What the means divide by, on the forget and on the retain side, where these
                batches are parts of a larger one; then losses and gradients add up to those of the
                whole. Else each loss is the mean over the answer tokens of all processes' batches,
                for an engine that averages gradients over processes.
            relearn: A batch of what is to be forgotten, whose means divide as on the forget side.
        """
        without_dropout(self.model, training=torch.is_grad_enabled())
        losses: dict[str, Tensor] = {}
        if forget is not None:
            losses["forget"] = self._forget(_batch(forget), totals and totals[0])
        if retain is not None:
            losses["kl"], losses["retain"] = self._retain(_batch(retain), totals and totals[1])
        if relearn is not None:
            losses["relearn"] = self._relearn(_batch(relearn), totals and totals[0])
        return losses

    def _relearn(self, batch: Batch, totals: LossDenominators | None) -> Tensor:
        batch = replace(batch, alternative=None)
        return answers_of(self.model, batch, totals or _totals(batch)).cross_entropy()

    def _forget(self, batch: Batch, totals: LossDenominators | None) -> Tensor:
        answers = answers_of(self.model, batch, totals or _totals(batch), layer=self.layer)
        return self.forget_loss(answers, lambda: self.reference.answers(batch))

    def _retain(self, batch: Batch, totals: LossDenominators | None) -> tuple[Tensor, Tensor]:
        # First, for to switch an adapter off touches the parameters that the graph leads to.
        original = self.reference.answers(batch)
        answers = answers_of(self.model, batch, totals or _totals(batch), layer=self.layer)
        retain, kl = linear_ce_kl(
            answers.hidden,
            answers.weight,
            answers.target,
            original.hidden.to(answers.hidden.dtype),  # FSDP2 casts parameters, and no cache
            original.weight.to(answers.hidden.dtype),
            **answers.head_options,
            ref_bias=original.bias,
            ref_logit_scale=original.transform.scale,
            ref_softcap=original.transform.softcap or math.inf,
            normalizer=answers.tokens,
        )
        return kl, retain if self.retain_loss is None else self.retain_loss(answers, original)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """The model's final hidden states at the answer tokens, [N, H], without dropout."""
        with in_evaluation_mode(self.model):
            return answer_hidden_states(self.model, batch)[0]


def _batch(batch: Batch | Mapping[str, Any]) -> Batch:
    return batch if isinstance(batch, Batch) else Batch(**batch)


def _totals(batch: Batch) -> LossDenominators:
    return LossDenominators(answer_tokens(batch.labels[:, 1:]), len(batch.labels))


def count_loss_tokens(rows: Sequence[Tokens]) -> LossDenominators:
    """Answer tokens that carry a loss, and sequences."""
    counted = (label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    return LossDenominators(sum(counted), len(rows))
