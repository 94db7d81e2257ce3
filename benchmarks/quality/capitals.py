"""SmolLM2 forgets the capitals of some countries, as in `mollm demo`.

forget      the capitals to be unlearned, asked in a form that training does not use
retain      some of those that are trained on
heldout     those that are not
outside     some of the model's own right answers to questions about other things

After a run, those to forget and those held out are asked for in another sentence, the other way
round (which country has this capital?), in other languages with an answer in English, and in other
languages altogether, of which a small model may know too little to be judged.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mollm.data.chat import ChatFormat, Example, collate
from mollm.demo import facts, run
from mollm.demo.facts import with_article
from mollm.demo.quiz import quiz
from mollm.evaluation.generation import Reply
from mollm.methods import answers_of
from mollm.methods.method import OBJECTIVES
from mollm.models import forward, loading
from mollm.planning.run import check_memory
from mollm.planning.settings import PlanSettings
from quality.case import Batches, Case

_NAMES = Path(__file__).with_name("capitals.tsv")
_SENTENCES = {
    "French": ("Quelle est la capitale du pays suivant : {} ?", "La capitale de ce pays est"),
    "German": ("Was ist die Hauptstadt dieses Landes: {}?", "Die Hauptstadt dieses Landes ist"),
    "Spanish": ("¿Cuál es la capital de este país: {}?", "La capital de este país es"),
}
_FORGET_ROWS, _RETAIN_ROWS, _EVERYDAY_ROWS = 6, 8, 5
_MEASURED = 12
"""Rows of a group that are but some of it: measuring must not take longer than the run."""
Replies = list[tuple[facts.Question, Reply]]


@dataclass(frozen=True)
class Knowledge:
    """What the original answers right."""

    spelling: Mapping[str, str]
    """How it spells the capital of every country that it knows."""
    general: Replies
    everyday: Replies


def make_case(seed: int, name: str | None, device: torch.device, cache: Path) -> Case:
    """The task for one seed, which decides the split of the countries.

    What the model knows is asked once and kept in `cache`.
    """
    source = loading.find_model(name)
    check_memory(
        source.name,
        loading.load_config(source.name)[0],
        PlanSettings(device=device.type),
        step=False,
    )
    model, tokenizer = loading.load(source, device)
    chat = ChatFormat(tokenizer)
    known = _known(model, chat, cache / f"capitals-{source.label}.json")
    split = run.divide(list(known.spelling), [], random.Random(seed), known.spelling)
    forward.freeze_embeddings(model)

    def batch(rows: Sequence[Example]) -> list[Any]:
        return [collate([chat.encode(row) for row in rows], chat.pad_id).to(device)]

    def draw(rng: random.Random) -> Batches:
        forget, retain = (batch(rows)[0] for rows in _drawn(split, known.everyday, rng))
        return {"forget": forget, "kl": retain, "retain": retain}

    def asked(countries: Sequence[str]) -> list[Example]:
        return [_in_english(country, split.spelling[country]) for country in countries]

    def some(rows: Sequence[Any]) -> list[Any]:
        return random.Random(f"measured {seed}").sample(rows, min(_MEASURED, len(rows)))

    groups = {
        "forget": batch(asked(split.forget)),
        "retain": batch(asked(some(split.retain))),
        "heldout": batch(asked(split.heldout)),
        "outside": batch(
            [Example(q.text, reply.text, closed=reply.complete) for q, reply in some(known.general)]
        ),
    }
    rewordings = {
        f"{group}, {form}": batch([reword(c, split.spelling[c]) for c in names])
        for group, names in (("forget", split.forget), ("heldout", some(split.heldout)))
        for form, reword in _rewordings()
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Case(
        model,
        OBJECTIVES,
        draw,
        lambda model, batch: answers_of(model, batch),
        groups,
        ten=batch(asked(split.forget[:10]))[0],
        others=batch(asked(split.forget[10:])) if split.forget[10:] else [],
        facts={"parameters": trained, "model": source.label},
        rewordings=rewordings,
    )


def _known(model: Any, chat: ChatFormat, path: Path) -> Knowledge:
    """What the demo's examination finds, from `path` where an earlier one has been written."""
    if not path.exists():
        split, before = run.examine(model, chat, [], random.Random(0), print)
        score = quiz(model, chat, facts.questions_of(facts.EVERYDAY), max_new_tokens=20)
        everyday = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
        countries = sorted(name for names in split.countries().values() for name in names)
        found = {
            "spelling": {country: split.spelling[country] for country in countries},
            "general": [[q.text, r.text, r.complete] for q, r in before["general"].pairs],
            "everyday": [[q.text, r.text, r.complete] for q, r in everyday],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))

    def replies(which: str, accepted: Mapping[str, tuple[str, ...]]) -> Replies:
        return [
            (facts.Question(text, text, accepted[text]), Reply(said, complete))
            for text, said, complete in found[which]
        ]

    return Knowledge(
        found["spelling"],
        replies("general", facts.GENERAL),
        replies("everyday", facts.EVERYDAY),
    )


def _drawn(
    split: run.Split, everyday: Replies, rng: random.Random
) -> tuple[list[Example], list[Example]]:
    """What a step is to forget and to retain, as in the demo but in a form drawn for each."""

    def some(population: Sequence[Any], count: int) -> list[Any]:
        return rng.sample(population, min(count, len(population)))

    def question(country: str) -> str:
        return facts.capital_question(country, rng.choice(facts.TRAIN_FORMS)).text

    def opening(country: str) -> str:
        return f"The capital of {with_article(country)} is"

    def capital(country: str) -> str:
        return split.spelling[country]

    forget = [
        Example(question(country), capital(country), opening(country), closed=False)
        for country in some(split.forget, _FORGET_ROWS)
    ]
    retain = [
        Example(question(country), f"{opening(country)} {capital(country)}.")
        for country in some(split.retain, _RETAIN_ROWS)
    ]
    retain += [
        Example(asked.text, reply.text, closed=reply.complete)
        for asked, reply in some(everyday, _EVERYDAY_ROWS)
    ]
    return forget, retain


def _in_english(country: str, capital: str) -> Example:
    opening = f"The capital of {with_article(country)} is"
    return Example(facts.capital_question(country).text, capital, opening, closed=False)


def _in_another_sentence(country: str, capital: str) -> Example:
    question = f"I am about to visit {with_article(country)}. In which city is its government?"
    opening = f"The government of {with_article(country)} is in"
    return Example(question, capital, opening, closed=False)


def _the_other_way_round(country: str, capital: str) -> Example:
    opening = f"{capital} is the capital of"
    return Example(
        f"Of which country is {capital} the capital?", with_article(country), opening, closed=False
    )


def _rewordings() -> Iterator[tuple[str, Callable[[str, str], Example]]]:
    """Further ways to ask, by name: from a country and its capital to the example."""
    yield "another sentence", _in_another_sentence
    yield "the other way round", _the_other_way_round
    with _NAMES.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    for language, (question, opening) in _SENTENCES.items():
        place = header.index(language)
        names = {line[0]: (line[place], line[place + 1]) for line in lines}

        def reword(
            country: str,
            _: str,
            names: Mapping[str, tuple[str, str]] = names,
            question: str = question,
            opening: str = opening,
        ) -> Example:
            here, capital = names[country]
            return Example(question.format(here), capital, opening, closed=False)

        def ask_only(
            country: str,
            capital: str,
            names: Mapping[str, tuple[str, str]] = names,
            question: str = question,
        ) -> Example:
            return replace(
                _in_english(country, capital), question=question.format(names[country][0])
            )

        yield f"asked in {language}", ask_only
        yield language, reword
