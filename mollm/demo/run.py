"""`mollm demo`: a real chat model forgets the capitals of some countries and keeps the rest.

The model is asked first, and only facts that it knows are used. They are split in three:

    forget    to be unlearned
    retain    trained to stay
    heldout   never trained on: does the damage spread?

A fourth group, general, holds questions about other things, never trained on either. The same
quiz, in a question form that training does not use, is held before and after.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mollm.data.chat import Batch, ChatFormat, Example, collate, ends_of, vocabulary_of
from mollm.demo import facts
from mollm.demo.facts import Question, capital_question
from mollm.demo.quiz import Score, quiz
from mollm.demo.report import DemoRun, conflict_rates, write_run
from mollm.demo.settings import DemoSettings
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply
from mollm.methods import find_method
from mollm.models import loading
from mollm.system import machine
from mollm.system.folders import staged
from mollm.system.precision import compute_dtype, computing_in
from mollm.training.history import StepRecord
from mollm.training.loop import unlearn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORGET_COUNT = 6
_FORGET_ROWS, _RETAIN_ROWS, _EVERYDAY_ROWS = 6, 8, 5
_FEWEST_KEPT = 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """The countries of each group, and how the model itself spells their capitals."""

    forget: list[str]
    retain: list[str]
    heldout: list[str]
    spelling: Mapping[str, str]

    def countries(self) -> dict[str, list[str]]:
        """The three groups by name."""
        return {"forget": self.forget, "retain": self.retain, "heldout": self.heldout}


def run_demo(settings: DemoSettings, *, say: Say = print) -> DemoRun:
    """Runs the whole demo and writes its results to `settings.out`.

    Raises:
        UsageError: Something that the user can put right, such as an unknown country.
    """
    started = time.perf_counter()
    chosen = facts.find_countries(settings.forget) if settings.forget else []
    machine.return_freed_memory()
    with staged(settings.out) as folder, computing_in(settings.compute_dtype):
        device = machine.find_device(settings.device)
        source = loading.find_model(settings.model)
        loading.check_memory(source, device)
        say(f"Loading {source.label} …")
        torch.manual_seed(settings.seed)
        model, tokenizer = loading.load(source, device)
        chat = ChatFormat(
            tokenizer,
            vocabulary=vocabulary_of(model.config),
            ends=ends_of(getattr(model, "generation_config", None)),
        )

        split, before = examine(model, chat, chosen, random.Random(settings.seed), say)
        history, seconds = train(model, chat, split, settings, say)
        say("Asking the same questions again …")
        after = {group: quiz(model, chat, score.questions) for group, score in before.items()}

        summary = _summary(settings, source.label, split, before, after, history)
        summary["seconds_training"] = round(seconds, 1)
        loading.save(model, tokenizer, folder / "model")
        summary["seconds"] = round(time.perf_counter() - started, 1)
        run = DemoRun(summary, before, after, history)
        write_run(run, folder)
    return run


def examine(
    model: PreTrainedModel,
    chat: ChatFormat,
    chosen: Sequence[str],
    rng: random.Random,
    say: Say,
) -> tuple[Split, dict[str, Score]]:
    """Asks what the model knows and splits that into groups.

    A capital counts as known when both a training form and the test form of the question are
    answered right.

    Returns:
        The split, and the replies to the test form and to the general questions that the model
        answers right.
    """
    form = facts.TRAIN_FORMS[0]
    say(f"Asking for {len(facts.CAPITALS)} capitals and {len(facts.GENERAL)} other facts …")
    first = quiz(model, chat, [capital_question(country, form) for country in facts.CAPITALS])
    second = quiz(model, chat, [capital_question(country) for country in first.known()])
    known = second.known()
    _refuse_unknown(chosen, known, first, model.name_or_path)
    split = divide(known, chosen, rng, _spellings(second))

    general = quiz(model, chat, facts.questions_of(facts.GENERAL))
    if not general.known():
        raise UsageError(
            f"{model.name_or_path} answers none of the general questions, so nothing can tell "
            "whether it is damaged: choose a larger model with --model."
        )
    before = {group: second.only(names) for group, names in split.countries().items()}
    before["general"] = general.only(general.known())
    say(
        f"It knows {len(known)} of the capitals and {len(general.known())} of the other facts. "
        f"To forget: {', '.join(split.forget)}."
    )
    return split, before


def divide(
    known: Sequence[str], chosen: Sequence[str], rng: random.Random, spelling: Mapping[str, str]
) -> Split:
    """Splits the countries that the model knows: `chosen` or six to forget, a third of the others
    held out, the rest to retain.

    Raises:
        UsageError: Too few countries would be left.
    """
    pool = rng.sample(sorted(known), len(known))
    forget = list(chosen) or pool[:_FORGET_COUNT]
    kept = [country for country in pool if country not in forget]
    if len(kept) < _FEWEST_KEPT:
        raise UsageError(
            f"the model must know at least {_FEWEST_KEPT} capitals beside those to forget, but it "
            f"knows {len(kept)}: forget fewer, or choose a larger model with --model."
        )
    cut = len(kept) // 3
    return Split(forget, kept[cut:], kept[:cut], spelling)


def _refuse_unknown(chosen: Sequence[str], known: Sequence[str], first: Score, model: str) -> None:
    for country in chosen:
        if country not in known:
            reply = first.only([country]).replies[0]
            raise UsageError(
                f"{model} does not reliably know the capital of {facts.with_article(country)} (it "
                f'says "{reply}"), so there is nothing to forget; it knows those of '
                f"{', '.join(sorted(known)) or 'no country'}."
            )


def _spellings(score: Score) -> dict[str, str]:
    found = {question.subject: question.spelling_in(reply.text) for question, reply in score.pairs}
    return {subject: spelling for subject, spelling in found.items() if spelling is not None}


class BatchSampler:
    """Draws the training batches.

    A forget row opens the answer with "The capital of Japan is" and asks a loss only of the name
    that follows: that is the fact, all else in the sentence is English. Retain rows are whole
    answers: sentences about other capitals, and the model's own answers to everyday questions
    where those are right.
    """

    def __init__(
        self,
        chat: ChatFormat,
        split: Split,
        everyday: Sequence[tuple[Question, Reply]],
        rng: random.Random,
        device: torch.device,
    ) -> None:
        self._chat = chat
        self._split = split
        self._everyday = everyday
        self._rng = rng
        self._device = device

    def __call__(self) -> tuple[Batch, Batch]:
        """The forget and the retain batch of the next step."""
        forget = [
            self._to_forget(country) for country in self._draw(self._split.forget, _FORGET_ROWS)
        ]
        retain = [
            self._to_keep(country) for country in self._draw(self._split.retain, _RETAIN_ROWS)
        ]
        retain += [
            Example(question.text, reply.text, closed=reply.complete)
            for question, reply in self._draw(self._everyday, _EVERYDAY_ROWS)
        ]
        return self._batch(forget), self._batch(retain)

    def _draw(self, population: Sequence[Any], count: int) -> list[Any]:
        return self._rng.sample(population, min(count, len(population)))

    def _question(self, country: str) -> str:
        return capital_question(country, self._rng.choice(facts.TRAIN_FORMS)).text

    def _to_forget(self, country: str) -> Example:
        opening = f"The capital of {facts.with_article(country)} is"
        spelling = self._split.spelling[country]
        return Example(self._question(country), spelling, opening, closed=False)

    def _to_keep(self, country: str) -> Example:
        subject = facts.with_article(country)
        answer = f"The capital of {subject} is {self._split.spelling[country]}."
        return Example(self._question(country), answer)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        rows = [self._chat.encode(example) for example in examples]
        return collate(rows, self._chat.pad_id).to(self._device)


def train(
    model: PreTrainedModel,
    chat: ChatFormat,
    split: Split,
    settings: DemoSettings,
    say: Say,
    **options: Any,
) -> tuple[list[StepRecord], float]:
    """Unlearns, with a progress bar.

    Returns:
        The record of every step, and the seconds they took.
    """
    score = quiz(model, chat, facts.questions_of(facts.EVERYDAY), max_new_tokens=20)
    everyday = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
    rng = random.Random(f"batches {settings.seed}")
    sampler = BatchSampler(chat, split, everyday, rng, model.device)
    say(f"Unlearning in {settings.steps} steps, method {settings.method} …")
    started = time.perf_counter()
    steps = unlearn(
        model,
        sampler,
        steps=settings.steps,
        lr=settings.lr,
        method=settings.method,
        **options,
    )
    bar = tqdm(steps, total=settings.steps, unit="step", dynamic_ncols=True)
    history = []
    for record in bar:
        history.append(record)
        bar.set_postfix({name: f"{loss:.3f}" for name, loss in record.losses.items()})
    return history, time.perf_counter() - started


def _summary(
    settings: DemoSettings,
    label: str,
    split: Split,
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    history: Sequence[StepRecord],
) -> dict[str, Any]:
    accuracies = {
        f"{group}_accuracy_{when}": scores[group].accuracy
        for group in before
        for when, scores in (("before", before), ("after", after))
    }
    return accuracies | {
        "model": label,
        "method": settings.method,
        "steps": settings.steps,
        "lr": settings.lr,
        "lr_schedule": "linear to 0",
        "optimizer": "adamw",
        "preferences": list(find_method(settings.method).preferences or ()) or None,
        "seed": settings.seed,
        "conflict_rate": conflict_rates(history),
        "skipped_steps": sum(not record.changes for record in history),
        "questions": {group: len(score.questions) for group, score in before.items()},
        "countries": split.countries(),
        "peak_memory_gb": round(machine.peak_memory_gb(), 2),
        "device": machine.device_name(torch.device(settings.device)),
        "compute_dtype": compute_dtype(torch.device(settings.device)).name,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": settings.command(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
