"""A model under audit, and how it is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mollm.audit.prompts import gives_away
from mollm.data.chat import ChatFormat, Tokens, context_of
from mollm.evaluation import metrics
from mollm.evaluation.generation import generate_replies
from mollm.evaluation.metrics import Floats
from mollm.evaluation.scores import TokenScores, score_rows
from mollm.evaluation.suite import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE_TOKENS = 16
"""Of a reply, beyond the longest answer: "As far as I know, …"."""
_MOST_TOKENS = 200


@dataclass(frozen=True)
class Subject:
    """A model under audit: the model itself, the original or the retain-only model."""

    label: str
    model: PreTrainedModel
    chat: ChatFormat
    batch_size: int
    seed: int

    def encode(self, rows: Sequence[Row]) -> list[Tokens]:
        """The rows with their answers, as tokens."""
        return [self.chat.encode(row.example(row.answer)) for row in rows]

    def scores(self, rows: Sequence[Row]) -> list[TokenScores]:
        """Of the answers' tokens, in the order of the rows."""
        return score_rows(
            self.model, self.encode(rows), pad_id=self.chat.pad_id, batch_size=self.batch_size
        )

    def likelihoods(self, rows: Sequence[Row]) -> Floats:
        """[len(rows)], P = exp(mean log-probability of the answer's tokens)."""
        return metrics.probability([each.mean_nll for each in self.scores(rows)])

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the rows fit into the model's context."""
        context = context_of(self.model.config)
        return all(len(tokens.ids) <= context for tokens in self.encode(rows))

    def leaks(self, rows: Sequence[Row], samples: int) -> list[int]:
        """[len(rows)], how many of so many sampled replies give the answer away."""
        longest = max(self.chat.answer_length(tokens) for tokens in self.encode(rows))
        asking = max(len(self.chat.encode_prompt(row.asked).ids) for row in rows)
        room = context_of(self.model.config) - asking  # 1 at least: the answers fit
        asked = [row for row in rows for _ in range(samples)]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            replies = generate_replies(
                self.model,
                self.chat,
                [row.asked for row in asked],
                max_new_tokens=int(min(longest + _SPARE_TOKENS, _MOST_TOKENS, room)),
                batch_size=4 * self.batch_size,
                sampled=True,
            )
        given = [gives_away(reply.text, row) for reply, row in zip(replies, asked, strict=True)]
        return [sum(given[start : start + samples]) for start in range(0, len(given), samples)]


def best_of(count: int, samples: int, k: int) -> float:
    """leak@k of one question: that at least one of k replies gives the answer away.

        1 - C(n - c, k) / C(n, k)

    is without bias for replies drawn from the model, where c of n did.

    Args:
        count: c.
        samples: n, at least k.
        k: How many replies an attacker looks at.

    Example:
        >>> best_of(1, samples=4, k=2)
        0.5
    """
    return 1 - math.comb(samples - count, k) / math.comb(samples, k)
