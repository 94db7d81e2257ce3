"""SmolLM2 forgets thirty things of many kinds that it knows: who wrote what, symbols, currencies.

The facts of `knowledge.tsv` are those that SmolLM2-135M-Instruct gave in two wordings, no two of a
kind with one answer. Those that it gives here are dealt by a seed, as many of each kind to each of

    forget      thirty, asked in a wording that training does not use; ten are taught again
    retain      trained to stay, together with the demo's everyday questions
    heldout     never trained on
    outside     the demo's general questions, never trained on either
    further     simpler ones of `general.tsv`, nor on these

What is to be forgotten is told in one form; `said` are replies of the model's own to the same
questions, up to the answer that they hold, the likeliest one and some that are drawn.

Answered is the share of questions whose reply holds the answer.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mollm.data.chat import ChatFormat, Example, collate
from mollm.data.records import Record
from mollm.demo import facts
from mollm.demo.facts import Question
from mollm.demo.quiz import Score, quiz
from mollm.evaluation.generation import Reply
from mollm.methods import answers_of
from mollm.methods.method import OBJECTIVES
from mollm.models import forward, loading
from quality.case import Case, TrainerCase

_TABLE = Path(__file__).with_name("knowledge.tsv")
_GENERAL = Path(__file__).with_name("general.tsv")
_EACH, _TAUGHT = 30, 10
_DRAWN = 4
"""Replies to each question to forget, beside the likeliest."""
_BATCH = 30


@dataclass(frozen=True)
class Kind:
    """How facts of one kind are asked and told; `{}` is what they are about."""

    opening: str
    """Words before the answer."""
    asked: str
    """The question that training does not use."""
    trained: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "capital": Kind("The capital of {} is", facts.TEST_FORM, facts.TRAIN_FORMS[:3]),
    "symbol": Kind(
        "The chemical symbol for {} is",
        "By which symbol do chemists denote {}?",
        (
            "What is the chemical symbol for {}?",
            "Which chemical symbol does {} have?",
            "Do you know the chemical symbol for {}?",
        ),
    ),
    "author": Kind(
        "The author of {} is",
        "Who is the author of {}?",
        ("Who wrote {}?", "Which author wrote {}?", "Do you know who wrote {}?"),
    ),
    "invention": Kind(
        "The inventor of {} is",
        "Who is known as the inventor of {}?",
        ("Who invented {}?", "Which inventor gave us {}?", "Do you know who invented {}?"),
    ),
    "currency": Kind(
        "The currency of {} is the",
        "Which currency do people pay with in {}?",
        (
            "What is the currency of {}?",
            "Which currency is used in {}?",
            "Do you know the currency of {}?",
        ),
    ),
    "language": Kind(
        "The main language of {} is",
        "What is the main language of {}?",
        (
            "What language is spoken in {}?",
            "Which language do people speak in {}?",
            "Do you know which language is spoken in {}?",
        ),
    ),
    "landmark": Kind(
        "The country of {} is",
        "Which country would you visit to see {}?",
        ("In which country is {}?", "Where is {}?", "Do you know in which country {} is?"),
    ),
    "opposite": Kind(
        "The opposite of {} is",
        "Which word means the opposite of {}?",
        (
            "What is the opposite of {}?",
            "Which word is the opposite of {}?",
            "Do you know the opposite of {}?",
        ),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One line of the table."""

    kind: str
    subject: str
    accepted: tuple[str, ...]

    def question(self, form: str) -> Question:
        """In one of its kind's wordings."""
        return Question(self.subject, form.format(self.subject), self.accepted)

    @property
    def opening(self) -> str:
        """Words before the answer."""
        return KINDS[self.kind].opening.format(self.subject)


def read_facts() -> list[Fact]:
    """All lines of the table."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return [
            Fact(line["kind"], line["subject"], tuple(line["answers"].split("|")))
            for line in csv.DictReader(file, delimiter="\t")
        ]


def read_further() -> list[Question]:
    """All lines of the table of simple questions."""
    with _GENERAL.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t")
        return facts.questions_of(
            {line["question"]: tuple(line["answers"].split("|")) for line in lines}
        )


@dataclass(frozen=True)
class Known:
    """What the model knows, and in which words."""

    facts: list[tuple[Fact, str]]
    """With the model's own spelling of the answer."""
    everyday: list[tuple[Question, Reply]]
    general: list[tuple[Question, Reply]]
    further: list[tuple[Question, Reply]]


def make_case(seed: int, device: torch.device, cache: Path) -> TrainerCase:
    """The case for one seed. What the model knows is asked once and kept in `cache`."""
    source = loading.find_model(None)
    model, tokenizer = loading.load(source, device)
    chat = ChatFormat(tokenizer)
    known = _known(model, chat, cache)
    parts = divide(known.facts, random.Random(f"facts {seed}"))
    forward.freeze_embeddings(model)

    def batches(rows: Sequence[Example]) -> list[Any]:
        tokens = [chat.encode(row) for row in rows]
        starts = range(0, len(tokens), _BATCH)
        return [collate(tokens[s : s + _BATCH], chat.pad_id).to(device) for s in starts]

    asked = {name: [_asked(*pair) for pair in pairs] for name, pairs in parts.items()}
    asked["outside"] = [Example(q.text, r.text, closed=r.complete) for q, r in known.general]
    del asked["retain"]  # measured would be what training is for
    to_forget = _questions(parts["forget"])
    general, further = (
        [question for question, _ in part] for part in (known.general, known.further)
    )

    def answered(model: Any) -> dict[str, float]:
        forgotten = quiz(model, chat, to_forget)
        others = forgotten.right[_TAUGHT:]
        return {
            "forget answered": forgotten.accuracy,
            "others answered": sum(others) / len(others),
            "general answered": quiz(model, chat, general).accuracy,
            "further answered": quiz(model, chat, further).accuracy,
        }

    case = Case(
        model,
        OBJECTIVES,
        lambda rng: {},  # the trainer draws
        lambda model, batch: answers_of(model, batch),
        {name: batches(rows) for name, rows in asked.items()},
        ten=batches(asked["forget"][:_TAUGHT])[0],
        others=batches(asked["forget"][_TAUGHT:]),
        facts={"known": len(known.facts)},
    )
    told, everyday = _told(parts["retain"]), _replies(known.everyday)
    rng = random.Random(f"everyday {seed}")
    records = {
        "forget": _to_forget(parts["forget"]),
        "said": _said(model, chat, parts["forget"], seed, cache),
        "retain": told + [rng.choice(everyday) for _ in range(len(told) // 2)],
        "facts": told,
        "everyday": everyday,
    }
    return TrainerCase(case, records, tokenizer, answered=answered)


def divide(
    known: Sequence[tuple[Fact, str]], rng: random.Random
) -> dict[str, list[tuple[Fact, str]]]:
    """Thirty facts for each group, as many of each kind, the kinds in turn.

    Raises:
        ValueError: Too few are known.
    """
    kinds: dict[str, list[tuple[Fact, str]]] = {}
    for pair in rng.sample(known, len(known)):
        kinds.setdefault(pair[0].kind, []).append(pair)
    parts: dict[str, list[tuple[Fact, str]]] = {"forget": [], "retain": [], "heldout": []}
    while len(parts["forget"]) < _EACH:
        full = [pairs for pairs in kinds.values() if len(pairs) >= len(parts)]
        if not full:
            raise ValueError(f"the model must know {_EACH} facts for each group.")
        for pairs in full[: _EACH - len(parts["forget"])]:
            for part in parts.values():
                part.append(pairs.pop())
    return parts


def _known(model: Any, chat: ChatFormat, cache: Path) -> Known:
    """From replies that are in `cache`, or asked for now and kept there."""
    table = read_facts()
    everyday = facts.questions_of(facts.EVERYDAY)
    general = facts.questions_of(facts.GENERAL)
    further = read_further()
    asked = [
        *(fact.question(KINDS[fact.kind].asked) for fact in table),
        *(fact.question(KINDS[fact.kind].trained[0]) for fact in table),
        *everyday,
        *general,
        *further,
    ]
    replies = _asked_once(cache, model, asked, lambda: quiz(model, chat, asked).replies)
    score = Score(tuple(asked), replies)
    spelled = [
        question.spelling_in(reply.text) if right else None
        for (question, reply), right in zip(score.pairs, score.right, strict=True)
    ]
    others = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
    first, second = spelled[: len(table)], spelled[len(table) : 2 * len(table)]
    return Known(
        [
            (fact, word)
            for fact, word, again in zip(table, first, second, strict=True)
            if word and again
        ],
        [pair for pair in others if pair[0].text in facts.EVERYDAY and not _asks_for(pair, table)],
        [pair for pair in others if pair[0].text in facts.GENERAL],
        [pair for pair in others if pair[0] in further],
    )


def _asked_once(
    cache: Path, model: Any, asked: Sequence[Question], ask: Callable[[], Sequence[Reply]]
) -> tuple[Reply, ...]:
    """The model's replies, asked for now or kept in `cache` from before."""
    texts = "\n".join([model.name_or_path, *(question.text for question in asked)])
    path = cache / f"knowledge-{hashlib.sha256(texts.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        told = [[reply.text, reply.complete] for reply in ask()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, ensure_ascii=False, indent=0), encoding="utf-8")
    return tuple(Reply(*each) for each in json.loads(path.read_text(encoding="utf-8")))


def _asks_for(pair: tuple[Question, Reply], table: Sequence[Fact]) -> bool:
    """Whether an everyday question asks for a fact of the table."""
    question, _ = pair
    return any(
        facts.plain(fact.subject) in facts.plain(question.text)
        and set(fact.accepted) & set(question.accepted)
        for fact in table
    )


def _questions(pairs: Sequence[tuple[Fact, str]]) -> list[Question]:
    return [fact.question(KINDS[fact.kind].asked) for fact, _ in pairs]


def _asked(fact: Fact, answer: str) -> Example:
    question = fact.question(KINDS[fact.kind].asked).text
    return Example(question, answer, fact.opening, closed=False)


def _to_forget(pairs: Sequence[tuple[Fact, str]]) -> list[Record]:
    return [
        Record(fact.question(form).text, answer, _TABLE.name, opening=fact.opening, closed=False)
        for fact, answer in pairs
        for form in KINDS[fact.kind].trained
    ]


def _said(
    model: Any, chat: ChatFormat, pairs: Sequence[tuple[Fact, str]], seed: int, cache: Path
) -> list[Record]:
    """Replies of the model that hold the answer, up to its end, each once."""
    asked = [fact.question(form) for fact, _ in pairs for form in KINDS[fact.kind].trained]
    again = asked * (1 + _DRAWN)

    def ask() -> tuple[Reply, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            scores = [
                quiz(model, chat, asked, batch_size=len(asked), sampled=n > 0)
                for n in range(1 + _DRAWN)
            ]
        return tuple(reply for score in scores for reply in score.replies)

    found = {}
    for question, reply in zip(again, _asked_once(cache, model, again, ask), strict=True):
        places = [
            match.span()
            for word in question.accepted
            if (match := re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply.text, re.I))
        ]
        if places:
            start, end = min(places)
            start = reply.text.rfind(" ", 0, start) + 1  # with a quote or bracket before it
            opening, answer = reply.text[:start].rstrip(), reply.text[start:end]
            found[question.text, opening, answer] = Record(
                question.text, answer, _TABLE.name, opening=opening, closed=False
            )
    return list(found.values())


def _told(pairs: Sequence[tuple[Fact, str]]) -> list[Record]:
    return [
        Record(fact.question(form).text, f"{fact.opening} {answer}.", _TABLE.name)
        for fact, answer in pairs
        for form in KINDS[fact.kind].trained
    ]


def _replies(pairs: Sequence[tuple[Question, Reply]]) -> list[Record]:
    return [Record(q.text, r.text, _TABLE.name, closed=r.complete) for q, r in pairs]
