"""What a model thinks of given answers: log-probabilities of their tokens, KL to the original.

Only the hidden states that predict answer tokens meet the head, a chunk of them at a time, so that
logits [B, T, V] never exist. Padding and the company that an example is batched with change nothing
but rounding; of weights in bf16, or where `models.autocast` is on, that is about 1e-2 in a
log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mollm.data.chat import IGNORE_INDEX, Batch, Tokens, collate
from mollm.errors import UsageError
from mollm.evaluation.metrics import Floats
from mollm.models.forward import answer_hidden_states, head, head_weights, in_evaluation_mode
from mollm.models.logits import logit_transform
from mollm.system.terminal import Done, quietly
from mollm_ops import linear_kl_div
from mollm_ops._dtypes import wide_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["left", "right"]

_CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at a time: 64 MiB in float32, and four more such arrays on the way."""
_SMALLEST_VARIANCE = 1e-6
"""As in open-unlearning: where the model is certain, log p does not vary."""


class NotFiniteError(UsageError):
    """A model puts out what is no number."""


@dataclass(frozen=True)
class TokenScores:
    """One example's tokens that carry a loss, in their order, in float64."""

    log_probs: Floats
    """[n], log p of each token, in nats."""
    means: Floats
    """[n], μ = Σ_v p_v log p_v over the vocabulary at its place."""
    stds: Floats
    """[n], σ = √max(Σ_v p_v (log p_v - μ)², 1e-6)."""
    hits: Floats
    """[n], 1 where the token is the likeliest one, else 0."""

    @property
    def mean_nll(self) -> float:
        """L = -Σ log p / n."""
        return -float(self.log_probs.mean())

    def without_last(self) -> TokenScores:
        """The same without the last token, which ends the turn and is no part of the answer."""
        return TokenScores(self.log_probs[:-1], self.means[:-1], self.stds[:-1], self.hits[:-1])


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    *,
    pad_id: int,
    batch_size: int = 16,
    side: Side = "right",
    done: Done = quietly,
) -> list[TokenScores]:
    """Scores the tokens of every row that carry a loss.

    Args:
        model: A causal language model; its training mode is put back at the end.
        rows: Encoded examples.
        pad_id: The id that fills a batch.
        batch_size: Rows that pass through the model together.
        side: Where rows are padded.
        done: Called with the number of rows of each batch.

    Returns:
        Scores in the order of `rows`.

    Raises:
        NotFiniteError: The model's output is not finite.
        UsageError: A row has no token with a loss.
    """
    layer, transform = head(model), logit_transform(model)
    scores: dict[int, TokenScores] = {}
    with in_evaluation_mode(model):
        for places, batch in _batches(rows, pad_id, batch_size, side):
            states, targets = answer_hidden_states(model, batch.to(model.device))
            columns = torch.cat(
                [
                    _token_statistics(transform(_widened(layer(part))), target)
                    for part, target in _chunks(states, targets, layer.weight.shape[0])
                ]
            )
            parts = torch.split(columns.double().cpu(), _counts(batch))
            for place, part in zip(places, parts, strict=True):
                scores[place] = TokenScores(*_finite_array(part, place).T)
            done(len(places))
    return [scores[place] for place in range(len(rows))]


@torch.no_grad()
def kl_to_original(
    model: PreTrainedModel,
    original: PreTrainedModel,
    rows: Sequence[Tokens],
    *,
    pad_id: int,
    batch_size: int = 16,
    done: Done = quietly,
) -> Floats:
    """KL(p_original ‖ p) in nats, the mean over the tokens of each row that carry a loss.

    Args:
        model: The model that was changed.
        original: What it was before; of the same vocabulary.
        rows: Encoded examples.
        pad_id: The id that fills a batch.
        batch_size: Rows that pass through both models together.
        done: Called with the number of rows of each batch.

    Returns:
        [len(rows)], in their order.

    Raises:
        UsageError: As in `score_rows`, or the vocabularies differ in size.
    """
    check_vocabularies(model, original)
    transform, ref_transform = logit_transform(model), logit_transform(original)
    weight, bias = head_weights(model)
    ref_weight, ref_bias = head_weights(original)
    kl = np.empty(len(rows))
    with in_evaluation_mode(model), in_evaluation_mode(original):
        for places, batch in _batches(rows, pad_id, batch_size, "right"):
            states, _ = answer_hidden_states(model, batch.to(model.device))
            ref_states, _ = answer_hidden_states(original, batch.to(original.device))
            losses = linear_kl_div(
                states,
                weight,
                ref_states.to(states),
                ref_weight.to(states),
                bias=bias,
                ref_bias=None if ref_bias is None else ref_bias.to(states),
                logit_scale=transform.scale,
                softcap=transform.softcap,
                ref_logit_scale=ref_transform.scale,
                ref_softcap=ref_transform.softcap or math.inf,
                reduction="none",
            )
            parts = torch.split(losses.double().cpu(), _counts(batch))
            for place, part in zip(places, parts, strict=True):
                kl[place] = _finite_array(part, place).mean()
            done(len(places))
    return kl


def check_vocabularies(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Refuses two models whose distributions are over vocabularies of different sizes.

    Raises:
        UsageError: They are.
    """
    mine, theirs = (len(head(each).weight) for each in (model, original))
    if mine != theirs:
        raise UsageError(
            f"the original must have the vocabulary of the model, but they have {theirs} and "
            f"{mine} tokens: give the model that unlearning started from, or its tokenizer too."
        )


def _batches(
    rows: Sequence[Tokens], pad_id: int, batch_size: int, side: Side
) -> Iterator[tuple[list[int], Batch]]:
    """Rows of like length together, longest first: a batch that is too large shows at once."""
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, but got {batch_size}.")
    for place, row in enumerate(rows):
        if all(label == IGNORE_INDEX for label in row.labels[1:]):
            raise UsageError(
                f"every row must have an answer of at least one token, but row {place} has none: "
                "leave it out."
            )
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield places, collate([rows[place] for place in places], pad_id, side)


def _counts(batch: Batch) -> list[int]:
    counts: list[int] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
    return counts


def _chunks(states: Tensor, targets: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return zip(torch.split(states, size), torch.split(targets, size), strict=True)


def _widened(outputs: Tensor) -> Tensor:
    return outputs.to(wide_dtype(outputs.dtype))


def _token_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, 4]: log p of the target, mean and deviation of log p under p, whether it is a hit."""
    log_p = torch.log_softmax(logits, dim=-1)  # [n, V]
    p = log_p.exp()
    mean = (p * log_p).sum(-1, keepdim=True)
    # Centred first: the difference of E[x²] and μ² would lose most digits of a small variance.
    variance = (p * (log_p - mean).square()).sum(-1).clamp(min=_SMALLEST_VARIANCE)
    at_target = log_p.gather(-1, targets[:, None]).squeeze(-1)
    hits = (log_p.argmax(-1) == targets).to(log_p.dtype)
    return torch.stack([at_target, mean.squeeze(-1), variance.sqrt(), hits], dim=-1)


def _finite_array(part: Tensor, place: int) -> Floats:
    if not part.isfinite().all():
        raise NotFiniteError(
            f"the model's output for row {place} must be finite, but it is not: has the model "
            "diverged? Evaluate an earlier checkpoint."
        )
    array: Floats = part.numpy()
    return array
