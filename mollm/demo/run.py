"""`mollm demo`: a real chat model forgets the capitals of some countries and keeps the rest.

The model is asked first, and only facts that it knows are used. They are split in three:

    forget    to be unlearned
    retain    trained to stay
    heldout   never trained on: does the damage spread?

A fourth group, general, holds questions about other things, never trained on either. The same
quiz, in a question form that training does not use, is held before and after. At the end a short
audit tries to bring the forgotten capitals back.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mollm.data.chat import ChatFormat
from mollm.data.records import Record
from mollm.demo import facts
from mollm.demo.facts import Question, capital_question
from mollm.demo.quiz import Score, quiz, quizzes
from mollm.demo.report import DemoRun, conflict_rates, write_run
from mollm.demo.settings import DemoSettings
from mollm.demo.short_audit import audit_shortly
from mollm.errors import UsageError
from mollm.evaluation.generation import Reply
from mollm.methods import find_method
from mollm.models import loading
from mollm.planning.run import check_memory
from mollm.system import machine
from mollm.system.folders import staged
from mollm.system.precision import compute_dtype, computing_in
from mollm.system.units import GIB
from mollm.training.config import MOLLMConfig
from mollm.training.history import StepRecord, skipped_in
from mollm.training.memory import plan_settings
from mollm.training.trainer import MOLLMTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.audit import Audit

_FORGET_COUNT = 6
_FORGET_ROWS, _CAPITAL_ROWS, _EVERYDAY_ROWS = 6, 8, 5
"""Of a step: to forget, and to retain."""
_LONGEST = 64
"""Tokens of a row, about; for the memory that it takes."""
_NO_LIMIT = 1e9
"""Nats: a baseline may ruin the model, for that is what it is there to show."""
_SOURCE = "the demo's facts"
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
    with staged(settings.out) as folder, computing_in(settings.compute_dtype):
        device = machine.find_device(settings.device)
        source = loading.find_model(settings.model)
        planned = plan_settings(_config(settings, folder), None, longest=_LONGEST)
        check_memory(source.name, loading.load_config(source.name)[0], planned, step=False)
        say(f"Loading {source.label} …")
        torch.manual_seed(settings.seed)
        model, tokenizer = loading.load(source, device)
        chat = ChatFormat.of(model, tokenizer)
        split, before = examine(model, chat, chosen, random.Random(settings.seed), say)
        original = copy.deepcopy(model)  # to load it again would take longer than its audit
        trainer, seconds = train(model, chat, split, settings, folder, say)
        say("Asking the same questions again …")
        after = quizzes(model, chat, {group: score.questions for group, score in before.items()})

        trainer.export(folder / "model")
        history, failure = trainer.history, trainer.stop_reason
        del trainer  # the attacker's training takes as much memory
        found, why_not = audit_shortly(
            model,
            original,
            tokenizer,
            split.forget,
            split.spelling,
            seed=settings.seed,
            say=say,
        )
        summary = _summary(settings, source.label, split, before, after, history)
        summary["failure"] = failure
        summary["audit"] = _audited(found, why_not)
        summary["seconds_training"] = round(seconds, 1)
        summary["seconds"] = round(time.perf_counter() - started, 1)
        run = DemoRun(summary, before, after, history, found)
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
    asked = {
        "capitals": [capital_question(country) for country in first.known()],
        "general": facts.questions_of(facts.GENERAL),
    }
    second, general = quizzes(model, chat, asked).values()
    known = second.known()
    _refuse_unknown(chosen, known, first, model.name_or_path)
    split = divide(known, chosen, rng, _spellings(second))

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


def forget_records(split: Split) -> list[Record]:
    """Each country to forget in each of the training forms.

    A record opens the answer with "The capital of Japan is" and asks a loss only of the name that
    follows: that is the fact, all else in the sentence is English.
    """
    return [
        Record(
            capital_question(country, form).text,
            split.spelling[country],
            _SOURCE,
            opening=f"The capital of {facts.with_article(country)} is",
            closed=False,
        )
        for country in split.forget
        for form in facts.TRAIN_FORMS
    ]


def retain_records(split: Split, everyday: Sequence[tuple[Question, Reply]]) -> list[Record]:
    """Whole answers: sentences about the other capitals in each of the training forms, and
    the model's own right answers to everyday questions.

    These are fewer, and stand there so often that they are five of thirteen.
    """
    capitals = [
        Record(
            capital_question(country, form).text,
            f"The capital of {facts.with_article(country)} is {split.spelling[country]}.",
            _SOURCE,
        )
        for country in split.retain
        for form in facts.TRAIN_FORMS
    ]
    others = [
        Record(question.text, reply.text, _SOURCE, closed=reply.complete)
        for question, reply in everyday
    ]
    wanted = len(capitals) * _EVERYDAY_ROWS / _CAPITAL_ROWS
    return capitals + others * round(wanted / max(1, len(others)))


def train(
    model: PreTrainedModel,
    chat: ChatFormat,
    split: Split,
    settings: DemoSettings,
    folder: Path,
    say: Say,
) -> tuple[MOLLMTrainer, float]:
    """Unlearns, with a progress bar, and writes history and model card into `folder`.

    Returns:
        The trainer, and the seconds that its steps took.
    """
    score = quiz(model, chat, facts.questions_of(facts.EVERYDAY), max_new_tokens=20)
    everyday = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
    say(f"Unlearning in {settings.steps} steps, method {settings.method} …")
    started = time.perf_counter()
    trainer = MOLLMTrainer(
        model,
        _config(settings, folder, len(split.forget), len(everyday)),
        forget_dataset=forget_records(split),
        retain_dataset=retain_records(split, everyday),
        processing_class=chat.tokenizer,
    )
    trainer.train()
    return trainer, time.perf_counter() - started


def _config(
    settings: DemoSettings,
    folder: Path,
    countries: int = _FORGET_ROWS,
    others: int = _EVERYDAY_ROWS,
) -> MOLLMConfig:
    """What the trainer is told.

    Args:
        settings: Those of the demo.
        folder: For history and card.
        countries: How many are to be forgotten.
        others: How many everyday questions the model answers right.
    """
    return MOLLMConfig(
        output_dir=str(folder),
        method=settings.method,
        learning_rate=settings.lr,
        max_steps=settings.steps,
        per_device_train_batch_size=min(_FORGET_ROWS, countries),
        per_device_retain_batch_size=_CAPITAL_ROWS + min(_EVERYDAY_ROWS, others),
        compute_dtype=settings.compute_dtype,
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
        max_loss_rise=_NO_LIMIT,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )


def _audited(found: Audit | None, why_not: str) -> dict[str, Any]:
    if found is None:
        return {"verdict": None, "reason": why_not}
    findings = [asdict(one) | {"interval": list(one.interval)} for one in found.findings]
    return {"verdict": found.verdict, "findings": findings}


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
        "skipped_steps": skipped_in(history),
        "questions": {group: len(score.questions) for group, score in before.items()},
        "countries": split.countries(),
        "peak_memory_gib": round(machine.peak_memory(torch.device(settings.device)) / GIB, 2),
        "device": machine.device_name(torch.device(settings.device)),
        "compute_dtype": compute_dtype(torch.device(settings.device)).name,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": settings.command(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
