"""The three losses of unlearning as one module, for any engine that wraps modules.

DistributedDataParallel and FSDP2 gather parameters and average gradients around the forward of the
module that they wrap. A loss that reads the head's weight outside of it meets a part of that
weight, or a gradient that nobody averages; so all losses are computed inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mollm.distributed import answer_tokens
from mollm.models import head
from mollm_ops import linear_ce_kl, linear_uce_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objectives(nn.Module):
    """Unlearning cross-entropy, KL to the original model, and cross-entropy.

        forget   linear_uce_loss on the batch to forget
        kl       KL(original ‖ model) on the batch to retain
        retain   cross-entropy on the batch to retain, from the same forward

    Each is the mean over the answer tokens of all processes' batches, wherever the engine averages
    gradients over processes.

    Args:
        model: a causal language model whose logits are head(final hidden state).
        reference: its original; stops training here.
        eps: of the unlearning cross-entropy, see `mollm_ops.uce_loss`.
    """

    def __init__(
        self, model: PreTrainedModel, reference: PreTrainedModel, *, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.model = model
        self.reference = reference.requires_grad_(False)
        self.eps = eps

    def forward(
        self, forget: Mapping[str, Tensor] | None = None, retain: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses of the batches that are given: "forget", "kl" and "retain".

        Args:
            forget: input_ids, attention_mask and labels, [B, T] each; a label is the token itself
                where it is part of an answer, else -100.
            retain: the same of the answers to keep.
        """
        losses: dict[str, Tensor] = {}
        weight, bias = head(self.model).weight, head(self.model).bias
        if forget is not None:
            target = forget["labels"][:, 1:]
            losses["forget"] = linear_uce_loss(
                _hidden(self.model, forget),
                weight,
                target,
                bias=bias,
                eps=self.eps,
                normalizer=answer_tokens(target),
            )
        if retain is not None:
            target = retain["labels"][:, 1:]
            with torch.no_grad():
                original = _hidden(self.reference, retain)
            losses["retain"], losses["kl"] = linear_ce_kl(
                _hidden(self.model, retain),
                weight,
                target,
                original,
                head(self.reference).weight,
                bias=bias,
                ref_bias=head(self.reference).bias,
                normalizer=answer_tokens(target),
            )
        return losses


def _hidden(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The states from which the tokens after the first are predicted, [B, T - 1, H]."""
    output = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    hidden: Tensor = output.last_hidden_state[:, :-1]
    return hidden
