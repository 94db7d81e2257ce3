"""A task for one seed: a model that knows something, what it is to forget, and how it is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mollm.methods import Answers

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
    answers: Callable[[nn.Module, Any], Answers]
    groups: Mapping[str, list[Any]]
    """Batches of whole groups: `forget`; `retain`, trained on; `heldout`, of the same kind but
    never trained on; and further ones by name, such as `outside`."""
    facts: Mapping[str, Any]
    """What the table says about the case: sizes and how well the original knows its groups."""


@torch.no_grad()
def likelihood(case: Case, model: nn.Module, group: str) -> float:
    """The mean over a group's answers of P = exp(mean log-probability of the answer's tokens)."""
    parts = []
    for batch in case.groups[group]:
        answers = case.answers(model, batch)
        parts.append((answers.log_likelihoods() / answers.lengths()).exp())
    return float(torch.cat(parts).mean())


def measure(case: Case, model: nn.Module, original: Mapping[str, float]) -> dict[str, float]:
    """What is left of the original's likelihood in each group, at most 1; NaN counts as nothing."""
    left = {name: likelihood(case, model, name) / original[name] for name in case.groups}
    return {name: min(share, 1.0) if share == share else 0.0 for name, share in left.items()}
