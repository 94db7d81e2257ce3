"""The attacks: each measures, of one model, what it gives away of every example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mollm.audit import prompts, rounding
from mollm.audit.findings import Measured, Scale, Scores
from mollm.audit.relearning import RATE_FACTOR, STEPS, Kind, taught
from mollm.audit.subject import Subject, best_of
from mollm.evaluation import metrics
from mollm.evaluation.metrics import Floats
from mollm.evaluation.scores import NotFiniteError
from mollm.evaluation.suite import Row

SIZES = (1, 3, 10, 30, 100)
"""Examples that are taught again; and half of the forget set, where that is fewer than the last."""
SHORT_LESSON = 10
"""Examples that a short audit teaches again, at most: half of the forget set."""
SAMPLES, BEST_OF = 16, 8
_SAMPLED_ROWS, _ASKED_TOGETHER = 20, 4
_JUDGED_ALONE = 10

Tick = Callable[[], object]


@dataclass(frozen=True)
class Attack:
    """One attack."""

    name: str
    """Of its finding."""
    work: int
    """How often `measure` calls `tick`."""
    measure: Callable[[Subject, Tick], Measured]
    """The scores of a model by setting."""
    scale: Scale = field(default_factory=Scale)
    measure_others: Callable[[Subject, Tick], Measured] | None = None
    """Of the original and the retain-only model, where it is not the same."""
    measure_original: Callable[[Subject, Tick], Measured] | None = None
    """Of the original, where it is not the same."""
    is_judged: bool = True
    """Whether there is a finding, or only a curve."""
    taught: int = 0
    """How many examples it teaches."""

    def work_on(self, role: str) -> int:
        """How often `run` calls `tick`."""
        return 1 if role == "original" and self.measure_original is not None else self.work

    def run(self, subject: Subject, role: str, tick: Tick) -> Measured:
        """What it measures of the "model", the "original" or the "retain-only" model."""
        measure = self.measure
        if role != "model" and self.measure_others is not None:
            measure = self.measure_others
        if role == "original" and self.measure_original is not None:
            measure = self.measure_original
        return measure(subject, tick)


def sizes_for(examples: int) -> list[int]:
    """How many examples are taught: 1, 3, 10, 30, 100, at most half of them, and that half.

    Example:
        >>> sizes_for(8), sizes_for(40), sizes_for(400)
        ([1, 3, 4], [1, 3, 10, 20], [1, 3, 10, 30, 100])
    """
    most = min(examples // 2, SIZES[-1])
    return [size for size in SIZES if size < most] + [most]


def as_it_is(rows: Sequence[Row]) -> Attack:
    """The questions as the forget set has them."""
    return Attack("asked as in the forget set", 1, _asking({"": rows}))


def with_prompts(
    rows: Sequence[Row], taught_rows: Sequence[Row], measured: Sequence[Row], subject: Subject
) -> tuple[list[Attack], dict[str, str]]:
    """Other words, the first half of the answer, other forgotten answers in the prompt.

    Args:
        rows: The forget set.
        taught_rows: The half of it whose answers may be shown.
        measured: The other half.
        subject: Who is asked, for the length of its context.

    Returns:
        The attacks, and for those that cannot be made why.
    """
    named = {
        "asked in other words": prompts.in_other_words(rows),
        "first half of the answer given": {"": prompts.with_first_half(rows)},
        "answers of other forgotten rows shown": {
            "": prompts.after_examples(measured, taught_rows[: prompts.SHOTS])
        },
    }
    attacks, missing = [], {}
    for name, settings in named.items():
        if not settings or any(len(some) < 2 for some in settings.values()):
            missing[name] = "it needs at least two rows with questions, and answers of two words"
        elif not all(subject.fits(some) for some in settings.values()):
            missing[name] = "its prompts do not fit into the model's context"
        else:
            attacks.append(Attack(name, len(settings), _asking(settings)))
    return attacks, missing


def _asking(settings: Mapping[str, Sequence[Row]]) -> Callable[[Subject, Tick], Any]:
    def measure(subject: Subject, tick: Tick) -> Measured:
        found: dict[str, Scores] = {}
        for setting, rows in settings.items():
            found[setting] = (subject.likelihoods(rows),)
            tick()
        return found

    return measure


def best_of_replies(rows: Sequence[Row]) -> Attack:
    """Replies drawn at temperature 1, of which the attacker looks at several."""
    asked = rows[:_SAMPLED_ROWS]

    def measure(subject: Subject, tick: Tick) -> Measured:
        counts = []
        for start in range(0, len(asked), _ASKED_TOGETHER):
            counts += subject.leaks(asked[start : start + _ASKED_TOGETHER], SAMPLES)
            tick()
        found = [best_of(count, SAMPLES, BEST_OF) for count in counts]
        return {"": (np.array(found),)}

    scale = Scale(f"leak@{BEST_OF}")
    work = -(-len(asked) // _ASKED_TOGETHER)
    return Attack(f"best of {BEST_OF} sampled replies", work, measure, scale)


def after_rounding(rows: Sequence[Row], name: str) -> Attack:
    """The weights rounded as in a quantised file."""

    def measure(subject: Subject, tick: Tick) -> Measured:
        with rounding.rounded(subject.model, name):
            found = {"": (subject.likelihoods(rows),)}
        tick()
        return found

    return Attack(f"rounded to {rounding.FORMATS[name]}", 1, measure)


def after_merging(rows: Sequence[Row], wrapped: Any) -> Attack:
    """The adapter of `wrapped` merged in the dtype that models are served in.

    What it adds to a weight may be less than bfloat16 can tell apart. Buffers stay as they are.
    """

    def measure(subject: Subject, tick: Tick) -> Measured:
        merged = copy.deepcopy(wrapped)
        for p in merged.parameters():
            p.data = p.data.to(torch.bfloat16)
        merged = merged.merge_and_unload()
        dtypes = {name: p.dtype for name, p in subject.model.named_parameters()}
        for name, p in merged.named_parameters():
            p.data = p.data.to(dtypes[name])
        found = {"": (replace(subject, model=merged).likelihoods(rows),)}
        tick()
        return found

    name = "adapter merged in bfloat16"
    return Attack(name, 1, measure, measure_others=_asking({"": rows}))


def after_relearning(
    rows: Sequence[Row],
    measured: Sequence[Row],
    learning_rates: Sequence[float],
    *,
    with_retain_only: bool,
    kinds: Sequence[Kind] = tuple(RATE_FACTOR),
) -> Attack:
    """`rows` taught again, and the likelihood of others measured.

    The original is not taught: it knows them. Beyond ten examples a model learns much that it never
    knew, so that without a retain-only model the result is drawn and not judged.
    """
    settings = {
        f"{kind}, lr {lr * RATE_FACTOR[kind]:g}": (kind, lr)
        for kind in kinds
        for lr in learning_rates
    }

    def measure(subject: Subject, tick: Tick) -> Measured:
        found: dict[str, Scores] = {}
        for name, (kind, lr) in settings.items():
            how: dict[str, Any] = {"kind": kind, "lr": lr, "seed": subject.seed}
            with taught(
                subject.model,
                subject.encode(rows),
                pad_id=subject.chat.pad_id,
                batch_size=subject.batch_size,
                after_step=tick,
                **how,
            ):
                found[name] = (likelihoods_or_nothing(subject, measured),)
        return found

    def untaught(subject: Subject, tick: Tick) -> Measured:
        known = subject.likelihoods(measured)
        tick()
        return dict.fromkeys(settings, (known,))

    count = f"{len(rows)} example{'s' if len(rows) > 1 else ''}"
    return Attack(
        f"taught {count} again",
        STEPS * len(settings),
        measure,
        measure_original=untaught,
        is_judged=with_retain_only or len(rows) <= _JUDGED_ALONE,
        taught=len(rows),
    )


def likelihoods_or_nothing(subject: Subject, rows: Sequence[Row]) -> Floats:
    """[len(rows)], 0 where so large a rate has left a model that puts out no numbers."""
    try:
        return subject.likelihoods(rows)
    except NotFiniteError:
        if len(rows) == 1:
            return np.zeros(1)
        return np.concatenate([likelihoods_or_nothing(subject, [row]) for row in rows])


def membership(rows: Sequence[Row], holdout: Sequence[Row]) -> Attack:
    """Whether the forget set looks more, or less, like training data than rows never seen."""

    def measure(subject: Subject, tick: Tick) -> Measured:
        scores = []
        for some in (rows, holdout):
            tokens = subject.scores(some)
            ends = (row.closed for row in subject.encode(some))
            words = [t.without_last() if end else t for t, end in zip(tokens, ends, strict=True)]
            scores.append(np.array([metrics.min_k(each.log_probs) for each in words]))
            tick()
        return {"": tuple(scores)}

    scale = Scale("AUC - 0.5", _advantage, ("forget", "holdout"), two_sided=True)
    return Attack("membership inference by Min-K", 2, measure, scale)


def _advantage(forget: Floats, holdout: Floats) -> float:
    return metrics.membership_auc(forget, holdout) - 0.5
