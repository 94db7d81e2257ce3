"""Synthetic facts in several domains, each with an objective of its own: K = 2 to 8.

A fact says which object stands in a relation to a subject. Every domain has subjects of its own;
relations and objects are common to all, and so is the rule that half of the facts follow, so that a
change made for one domain reaches the others. A small residual network reads the embeddings of
subject and relation and has learnt every fact.

    forget      all facts of some subjects of the first domain
    retain k    facts of half of the other subjects of domain k, k = 1 … K − 1
    heldout     those of the other half
    outside     a domain that no objective speaks of
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mollm.methods import AnswerTokens
from quality.case import Batches, Case

_SUBJECTS, _RELATIONS, _OBJECTS, _CLUSTERS = 24, 4, 48, 6
_FORGOTTEN, _BATCH, _WIDTH = 6, 24, 48
_LEARNING_STEPS = 400


@dataclass(frozen=True)
class Facts:
    """Facts as numbers."""

    subject: Tensor  # [N]
    relation: Tensor  # [N]
    object: Tensor  # [N]

    def of(self, rows: Tensor) -> Facts:
        """Some of them."""
        return Facts(self.subject[rows], self.relation[rows], self.object[rows])

    def about(self, subjects: range) -> Facts:
        """Those of some subjects."""
        wanted = (self.subject >= subjects.start) & (self.subject < subjects.stop)
        return self.of(wanted.nonzero()[:, 0])


class FactModel(nn.Module):
    """h = blocks(E[subject] + R[relation]), logits = head(h)."""

    def __init__(self, subjects: int) -> None:
        super().__init__()
        self.subjects = nn.Embedding(subjects, _WIDTH)
        self.relations = nn.Embedding(_RELATIONS, _WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 96), nn.GELU(), nn.Linear(96, _WIDTH)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(_WIDTH, _OBJECTS)

    def forward(self, facts: Facts) -> Tensor:
        """[N, H]: the states that meet the head."""
        h = self.subjects(facts.subject) + self.relations(facts.relation)
        for block in self.blocks:
            h = h + block(h)
        return h


def answers(model: nn.Module, facts: Facts) -> AnswerTokens:
    """One answer of one token for every fact."""
    assert isinstance(model, FactModel), "facts are asked of a FactModel"
    order = torch.arange(len(facts.object))
    head = model.head
    return AnswerTokens(model(facts), head.weight, head.bias, facts.object, order, len(order))


def make_case(objectives: int, seed: int) -> Case:
    """The task with K objectives for one seed, which decides facts, model and split."""
    torch.manual_seed(seed)
    domains = objectives  # K − 1 with an objective to retain, and one outside
    facts = _invent(domains)
    model = _taught(facts, domains)

    def of(subjects: range) -> Facts:
        return facts.about(subjects)

    parts: dict[str, Facts] = {"forget": of(range(_FORGOTTEN))}
    heldout = []
    for k in range(objectives - 1):
        first, last = k * _SUBJECTS + (_FORGOTTEN if k == 0 else 0), (k + 1) * _SUBJECTS
        middle = (first + last) // 2
        parts[f"retain {k + 1}"] = of(range(first, middle))
        heldout.append(of(range(middle, last)))
    names = tuple(parts)

    def draw(rng: random.Random) -> Batches:
        return {name: _sample(part, rng) for name, part in parts.items()}

    groups: dict[str, list[Any]] = {
        "forget": [parts["forget"]],
        "retain": [parts[name] for name in names[1:]],
        "heldout": heldout,
        "outside": [of(range((domains - 1) * _SUBJECTS, domains * _SUBJECTS))],
    }
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    order = torch.randperm(len(parts["forget"].object))
    ten, others = (parts["forget"].of(rows) for rows in (order[:10], order[10:]))
    return Case(model, names, draw, answers, groups, ten, [others], {"parameters": size})


def never_learnt(objectives: int, seed: int) -> FactModel:
    """The model of the case that learnt all facts but those to forget."""
    torch.manual_seed(seed)
    facts = _invent(objectives)
    return _taught(facts.about(range(_FORGOTTEN, objectives * _SUBJECTS)), objectives)


def relearning_apart(batches: Batches, rng: random.Random) -> tuple[Batches, Facts]:
    """Batches whose rows to forget are half of them, and the other half, for `relearnt`."""
    forget = batches["forget"]
    order = torch.tensor(rng.sample(range(len(forget.object)), len(forget.object)))
    seen, others = order.chunk(2)
    return {**batches, "forget": forget.of(seen)}, forget.of(others)


def _sample(facts: Facts, rng: random.Random) -> Facts:
    count = len(facts.object)
    return facts.of(torch.tensor(rng.sample(range(count), min(count, _BATCH))))


def _invent(domains: int) -> Facts:
    """Half of the facts follow from the subject's cluster, the others from nothing."""
    subject = torch.arange(domains * _SUBJECTS).repeat_interleave(_RELATIONS)
    relation = torch.arange(_RELATIONS).repeat(domains * _SUBJECTS)
    cluster = torch.randint(_CLUSTERS, (domains * _SUBJECTS,))[subject]
    rule = torch.randint(_OBJECTS, (_CLUSTERS, _RELATIONS))[cluster, relation]
    chance = torch.randint(_OBJECTS, rule.shape)
    return Facts(subject, relation, torch.where(torch.rand(rule.shape) < 0.5, rule, chance))


def _taught(facts: Facts, domains: int) -> FactModel:
    """A model that knows the facts, of whose parameters only the blocks are trained later."""
    model = FactModel(domains * _SUBJECTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_LEARNING_STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model.head(model(facts)), facts.object)
        torch.autograd.backward(loss)
        optimizer.step()
    for part in (model.subjects, model.relations, model.head):
        part.requires_grad_(False)
    return model
