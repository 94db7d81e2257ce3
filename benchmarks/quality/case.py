"""A task for one seed: a model that knows something, what it is to forget, and how it is asked."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mollm.data.records import Record
from mollm.methods import AnswerTokens

Batches = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One task for one seed. A batch is whatever `answers` understands."""

    model: nn.Module
    """The original; parameters that require a gradient are those to unlearn with."""
    objectives: tuple[str, ...]
    """The first is forgetting."""
    draw: Callable[[random.Random], Batches]
    """The batch of each objective for the next step."""
    answers: Callable[[nn.Module, Any], AnswerTokens]
    groups: Mapping[str, list[Any]]
    """Batches of whole groups: `forget`; `retain`, trained on; `heldout`, of the same kind but
    never trained on; and further ones by name, such as `outside`. Measured along a run."""
    ten: Any
    """Ten examples of the forget set, to be learnt again after the run."""
    others: list[Any]
    """Batches of the other examples of the forget set; none where there are but ten or fewer."""
    facts: Mapping[str, Any]
    """What the table says about the case: sizes and how well the original knows its groups."""
    rewordings: Mapping[str, list[Any]] = field(default_factory=dict)
    """Batches of the same facts asked in other ways, measured before and after a run."""
    figures: Callable[[nn.Module], dict[str, float]] = lambda model: {}
    """Figures of the task's own, of a model after its run."""

    @functools.cached_property
    def original(self) -> dict[str, float]:
        """The original model's likelihood of each group and rewording."""
        named = {**self.groups, **self.rewordings}
        return {name: likelihood(self, self.model, batches) for name, batches in named.items()}


@dataclass(frozen=True)
class TrainerCase:
    """A case, and what a trainer is given of it."""

    case: Case
    records: Mapping[str, Sequence[Record]]
    """`forget` and `retain`, and further ones by name."""
    tokenizer: Any
    never: Callable[[], Any] | None = None
    """The model that never learnt the rows, if there is one."""
    answered: Callable[[Any], dict[str, float]] = lambda model: {}
    """Of a model, also of one that was taught again: shares of questions answered, by name."""


@torch.no_grad()
def likelihood(case: Case, model: nn.Module, batches: Sequence[Any]) -> float:
    """The mean over the batches' answers of P = exp(mean log-probability of its tokens)."""
    parts = []
    for batch in batches:
        answers = case.answers(model, batch)
        parts.append((answers.log_likelihoods() / answers.lengths()).exp())
    return float(torch.cat(parts).mean())


def share(left: float, original: float) -> float:
    """What is left of the original's likelihood, at most 1; NaN counts as nothing."""
    return min(left / original, 1.0) if left == left else 0.0


def measure(case: Case, model: nn.Module, named: Mapping[str, list[Any]]) -> dict[str, float]:
    """What is left of the original's likelihood in each of the case's groups or rewordings."""
    return {
        name: share(likelihood(case, model, batches), case.original[name])
        for name, batches in named.items()
    }
