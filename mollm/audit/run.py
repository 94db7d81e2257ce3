"""`audit`: attacks a model that unlearned, and compares it with the original."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mollm.audit import attacks, rounding
from mollm.audit.attacks import Attack
from mollm.audit.findings import (
    LEAST_GAP,
    LEAST_KEPT,
    Finding,
    Measured,
    Verdict,
    judge,
    judge_kept,
    worst,
)
from mollm.audit.subject import Subject
from mollm.data.chat import ChatFormat
from mollm.data.encoding import CUT, check_long_rows
from mollm.data.prompt_format import FormatOption
from mollm.errors import UsageError
from mollm.evaluation.examine import Examiner
from mollm.evaluation.metrics import mean
from mollm.evaluation.suite import Row, Suite
from mollm.models.four_bits import in_four_bits
from mollm.models.logits import check_logits
from mollm.report.audit_file import shown_verdict
from mollm.system.precision import computing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEARNING_RATES = (5e-5, 5e-4, 1.5e-3)
"""Of relearning: small language models meet their worst attack at the last two, larger ones at the
first."""
FEWEST_ROWS = 4
MOST_ROWS = 200
NO_RETAIN_ONLY = (
    "No retain-only model was given: the limits are shares of what the original gives away, and "
    "what any model would guess or learn counts as remembered."
)
"""What the verdict lacks without one."""
SHORT = (
    "A short audit: no replies were sampled, no weights rounded, no adapter taught, no membership "
    "inferred, and one number of examples taught again."
)
"""What the verdict of one lacks."""


@dataclass(frozen=True)
class CurvePoint:
    """What one setting of relearning brought back of the rows that were not taught."""

    examples: int
    """How many were taught."""
    setting: str
    model: float
    """Their likelihood afterwards, as a share of the original's; so is the next one."""
    retain_only: float | None


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    verdict: Verdict
    """FAIL if a finding is, else WEAK if a finding is, else PASS."""
    findings: tuple[Finding, ...]
    curve: tuple[CurvePoint, ...]
    missing: Mapping[str, str]
    """For each attack that was not made, or says nothing here, why."""
    notes: tuple[str, ...]
    rows: Mapping[str, int]
    """How many rows of each set, and of the forget set how many were taught and measured."""
    settings: Mapping[str, Any]
    seconds: float = 0.0
    complete: bool = True
    """Whether all attacks are done."""

    @property
    def verdict_shown(self) -> str:
        """The verdict; of a short audit it says so, such as "PASS (short)"."""
        return shown_verdict(self.verdict, short=bool(self.settings.get("short")))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in audit.json; without a verdict while it is not complete."""
        return asdict(self) | ({} if self.complete else {"verdict": None})


def audit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    original: PreTrainedModel,
    retain_only: PreTrainedModel | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prompt_format: FormatOption = None,
    long_rows: str = CUT,
    short: bool = False,
    after_finding: Callable[[Audit], object] = lambda audit: None,
    progress: bool = False,
) -> Audit:
    """Tries to bring forgotten answers back, and says how much of them came.

        value = (model - base) / (original - base)

    for every attack, of the mean likelihood exp(-L) of the answers, or of what else the attack
    measures: 0 for a model that never saw them, 1 for the original. `base` is what the attack gets
    out of the retain-only model, and 0 without one. See `Finding` for the verdicts.

    The forget set is split by the seed: one half is for the attacker to teach or to show, the other
    half is measured. Each attack starts from the same weights, bit for bit, and so does whoever
    uses the models afterwards.

    Args:
        model: The model that unlearned: a causal language model, or a `peft.PeftModel` around one,
            whose adapter is merged.
        tokenizer: Its tokenizer.
        suite: Its `forget` rows; `retain` to see what was kept, `holdout` for membership inference.
        original: What the model was before.
        retain_only: A model that learnt what the original did without the forget set.
        learning_rates: Of relearning the weights; an adapter takes ten times as much.
        batch_size: Rows that pass through a model together.
        resamples: Resamples of each confidence interval.
        seed: Of the split, of sampled replies, of adapters and of the resampling.
        system_prompt: Of conversations that have none of their own.
        chat_template_kwargs: Options of the chat template.
        prompt_format: How prompts are written: "none" for plain text, "chat", a template, or
            options, see `mollm.data.prompt_format.PromptFormat`.
        long_rows: What becomes of questions that are too long for the model's context: "cut" takes
            of their beginning, "skip" leaves the rows out.
        short: Whether to make only the attacks that take a small model seconds: the questions as
            they are, in other words, with half of the answer and after shown answers; and half of
            the forget set, ten examples at most, taught again without an adapter.
        after_finding: Called with the audit so far whenever there is another finding.
        progress: Whether to show a bar for each attack on each model.

    Raises:
        UsageError: The forget set has fewer than 4 rows that fit, the models are not of one
            architecture, the original or the retain-only model has an adapter or both are one
            object, or the original does not know the forget set.
    """
    check_options(suite, learning_rates, batch_size, resamples, seed)
    check_long_rows(long_rows)
    wrapped = model if hasattr(model, "peft_config") else None
    whole = model if wrapped is None else copy.deepcopy(wrapped).merge_and_unload()
    chat = ChatFormat.of(
        whole,
        tokenizer,
        template_kwargs=chat_template_kwargs,
        system_prompt=system_prompt,
        prompt_format=prompt_format,
    )
    models = {"original": original, "retain-only": retain_only, "model": whole}
    _check_whole(original, retain_only)
    subjects = {
        role: Subject(role, each, chat, batch_size, seed)
        for role, each in models.items()
        if each is not None
    }
    _check_models(subjects)
    suite, changed = _fitted(subjects["model"], _drawn(suite, seed), long_rows)
    check_options(suite, learning_rates, batch_size, resamples, seed)
    made, missing = _attacks(suite, subjects, wrapped, learning_rates, short=short)
    course = _Course(
        made,
        subjects,
        {
            "learning_rates": list(learning_rates),
            "batch_size": batch_size,
            "chat": chat.identity,
            "short": short,
        },
        resamples,
        seed,
        _counts(suite),
        (
            *_notes(adapter=wrapped is not None, retain_only=retain_only is not None, short=short),
            *changed,
        ),
        missing,
        progress,
    )
    with computing_in("float32"):
        course.attack_others()
        for attack in made:
            if course.attack_model(attack):
                after_finding(course.audit(complete=False))
        if suite.retain is not None and course.judge_kept(suite.retain):
            after_finding(course.audit(complete=False))
    return course.audit(complete=True)


@dataclass
class _Course:
    """An audit under way."""

    attacks: list[Attack]
    subjects: Mapping[str, Subject]
    settings: dict[str, Any]
    resamples: int
    seed: int
    rows: dict[str, int]
    notes: tuple[str, ...]
    missing: dict[str, str]
    progress: bool
    findings: list[Finding] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    others: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """What the attacks got out of the other models, by role and attack."""
    started: float = field(default_factory=time.perf_counter)

    def audit(self, *, complete: bool) -> Audit:
        return Audit(
            worst([finding.verdict for finding in self.findings]),
            tuple(self.findings),
            tuple(self.curve),
            dict(self.missing),
            self.notes,
            self.rows,
            {**self.settings, "resamples": self.resamples, "seed": self.seed},
            round(time.perf_counter() - self.started, 1),
            complete,
        )

    def attack_others(self) -> None:
        """Attacks the original and the retain-only model.

        Raises:
            UsageError: The original does not know the forget set.
        """
        plain, *_ = self.attacks
        for role in ("original", "retain-only"):
            if role in self.subjects:
                self.others[role] = {plain.name: self._run(plain, role)}
        self._refuse_unknown_rows(plain)
        for role, found in self.others.items():
            found |= {attack.name: self._run(attack, role) for attack in self.attacks[1:]}

    def _refuse_unknown_rows(self, plain: Attack) -> None:
        known, *rest = (plain.scale.level(*found[plain.name][""]) for found in self.others.values())
        if known - sum(rest) < LEAST_GAP:
            beside = "" if not rest else f", and the retain-only model {rest[0]:.3f}"
            raise UsageError(
                "the original must know what was to be forgotten, but gives the answers of the "
                f"forget set a likelihood of {known:.3f}{beside}: are model, original and forget "
                "set those of one run?"
            )

    def attack_model(self, attack: Attack) -> bool:
        """Attacks the model; whether there is another finding."""
        mine = self._run(attack, "model")
        first = self.others["original"][attack.name]
        base = self.others.get("retain-only", {}).get(attack.name)
        points = curve_of(attack, mine, first, base) if attack.taught else []
        self.curve += points
        if attack.taught and not points:
            self.missing[attack.name] = (
                "the original does not know the half of the forget set that is measured"
            )
            return False
        if not attack.is_judged:
            self.missing[attack.name] = (
                "more than ten examples also teach what a model never knew, and only a retain-only "
                "model tells that apart: see the curve"
            )
            return False
        options = {"resamples": self.resamples, "seed": self.seed}
        finding = judge(attack.name, attack.scale, mine, first, base, **options)
        if finding is None:
            self.missing[attack.name] = (
                "the original does not give away enough more than a model that never saw the rows"
            )
            return False
        self.findings.append(finding)
        return True

    def judge_kept(self, rows: Sequence[Row]) -> bool:
        """Looks at what was kept; whether there is another finding."""
        scores = {role: subject.likelihoods(rows) for role, subject in self.subjects.items()}
        finding = judge_kept(
            scores["model"],
            scores["original"],
            scores.get("retain-only"),
            resamples=self.resamples,
            seed=self.seed,
        )
        if finding is None:
            self.missing["lost of the retain set"] = (
                f"the original gives it a likelihood below {LEAST_KEPT}, too little to lose any"
            )
            return False
        self.findings.append(finding)
        return True

    def _run(self, attack: Attack, role: str) -> Measured:
        work = attack.work_on(role)
        with tqdm(
            total=work,
            desc=f"{role}: {attack.name}",
            unit="pass",
            leave=False,
            dynamic_ncols=True,
            disable=not self.progress,
        ) as bar:
            return attack.run(self.subjects[role], role, bar.update)


def curve_of(
    attack: Attack, mine: Measured, first: Measured, base: Measured | None
) -> list[CurvePoint]:
    """None of a setting where the original does not know the measured half."""

    def share(found: Measured, setting: str) -> float:
        return mean(found[setting][0]) / mean(first[setting][0])

    return [
        CurvePoint(
            attack.taught,
            setting,
            share(mine, setting),
            None if base is None else share(base, setting),
        )
        for setting in mine
        if mean(first[setting][0]) >= LEAST_GAP
    ]


# ---- what is attacked, and how


def split(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """The half that an attacker teaches or shows, and the other one, which is measured."""
    half = len(rows) // 2
    return rows[:half], rows[half:]


def _drawn(suite: Suite, seed: int) -> Suite:
    """At most MOST_ROWS rows of each set, in an order of the seed's."""

    def draw(name: str, rows: Sequence[Row] | None) -> Sequence[Row] | None:
        if rows is None:
            return None
        return random.Random(f"{name} {seed}").sample(rows, min(len(rows), MOST_ROWS))

    forget = draw("forget", suite.forget)
    assert forget is not None, "every suite has one"
    return Suite(
        forget, retain=draw("retain", suite.retain), holdout=draw("holdout", suite.holdout)
    )


def _attacks(
    suite: Suite,
    subjects: Mapping[str, Subject],
    wrapped: Any,
    learning_rates: Sequence[float],
    *,
    short: bool,
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks, the plain question first, and why others are not made."""
    rows = suite.forget
    taught, measured = split(rows)
    relearning: dict[str, Any] = {"with_retain_only": "retain-only" in subjects}
    prompts, missing = attacks.with_prompts(rows, taught, measured, subjects["model"])
    made = [attacks.as_it_is(rows), *prompts]
    if short:
        lesson = taught[: attacks.SHORT_LESSON]
        made.append(
            attacks.after_relearning(
                lesson, measured, learning_rates, kinds=("full",), **relearning
            )
        )
        return made, missing
    made.append(attacks.best_of_replies(rows))
    for name in rounding.FORMATS:
        attack = attacks.after_rounding(rows, name)
        reason = rounding.obstacle(subjects["model"].model, name)
        if reason is None:
            made.append(attack)
        else:
            missing[attack.name] = reason
    if wrapped is not None:
        made.append(attacks.after_merging(rows, wrapped))
    sizes = attacks.sizes_for(len(rows))
    made += [
        attacks.after_relearning(taught[:size], measured, learning_rates, **relearning)
        for size in sizes
    ]
    if suite.holdout is None:
        missing["membership inference"] = "it needs rows that no model was trained on, as holdout"
    else:
        made.append(attacks.membership(rows, suite.holdout))
    if suite.retain is None:
        missing["lost of the retain set"] = "it needs the retain set"
    return made, missing


def _counts(suite: Suite) -> dict[str, int]:
    taught, measured = split(suite.forget)
    counts = {name: len(rows) for name, rows in suite.groups().items()}
    return counts | {"to teach": len(taught), "measured": len(measured)}


def _notes(*, adapter: bool, retain_only: bool, short: bool) -> tuple[str, ...]:
    notes = [] if retain_only else [NO_RETAIN_ONLY]
    if short:
        notes.append(SHORT)
    if adapter:
        notes.append(
            "The model is an adapter: whoever has it and the original can take it off, and then "
            "nothing is forgotten. The audit is of the model with the adapter merged."
        )
    return tuple(notes)


# ---- what is refused


def check_options(
    suite: Suite, learning_rates: Sequence[float], batch_size: int, resamples: int, seed: int
) -> None:
    """Refuses what `audit` would refuse, as far as that needs no model.

    Raises:
        UsageError: The forget set has fewer than FEWEST_ROWS rows, or an option is out of range.
    """
    if len(suite.forget) < FEWEST_ROWS:
        raise UsageError(
            f"an audit needs at least {FEWEST_ROWS} forget rows, half of them to teach again and "
            f"half to measure, but got {len(suite.forget)}: give all that was to be forgotten."
        )
    for name, value in (("batch_size", batch_size), ("resamples", resamples)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but got {value}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be from 0 to {2**32 - 1}, but got {seed}.")
    if not learning_rates or not all(0 < lr < 1 for lr in learning_rates):
        raise UsageError(
            "learning_rates must be one or more numbers between 0 and 1, but got "
            f"{', '.join(map(str, learning_rates)) or 'none'}."
        )


def _check_whole(original: Any, retain_only: Any) -> None:
    if retain_only is original:
        raise UsageError(
            "retain_only must be another model than the original, one that never saw the forget "
            "set, but is the same object: give that model, or None."
        )
    for name, model in (("original", original), ("retain_only", retain_only)):
        if hasattr(model, "peft_config"):
            raise UsageError(
                f"{name} must be a whole model, but is a {type(model).__name__} with an adapter: "
                "give model.merge_and_unload()."
            )


def _check_models(subjects: Mapping[str, Subject]) -> None:
    for role, subject in subjects.items():
        check_logits(subject.model)
        if any(in_four_bits(p) for p in subject.model.parameters()):
            raise UsageError(
                f"the weights of the {role} must be whole to be taught and rounded, but are in 4 "
                "bits: give the model that they were rounded from."
            )
        mine = {name: p.shape for name, p in subjects["model"].model.named_parameters()}
        theirs = {name: p.shape for name, p in subject.model.named_parameters()}
        name = next((n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)), None)
        if name is not None:
            raise UsageError(
                f"the {role} model must be of the architecture of the one under audit, but {name} "
                f"is {_shape(theirs.get(name))} in it and {_shape(mine.get(name))} there: give the "
                "models of one run."
            )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape))


def _fitted(subject: Subject, suite: Suite, long_rows: str) -> tuple[Suite, list[str]]:
    """The suite with its rows as they fit into the model's context, and what was done to them."""
    examiner = Examiner(subject.model, subject.chat)
    fitted = {
        group: examiner.fit(group, rows, {"nll"}, long_rows)
        for group, rows in suite.groups().items()
    }
    asked = {group: each.asked for group, each in fitted.items()}
    notes = [note for each in fitted.values() for note in each.notes]
    return Suite(asked["forget"], retain=asked.get("retain"), holdout=asked.get("holdout")), notes
