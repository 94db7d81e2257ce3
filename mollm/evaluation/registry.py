"""The figures there are, each a statistic of the scores of the records of one or more sets.

Scores of a record, where L is a mean negative log-likelihood in nats (see `metrics`):

    nll, probability                          L of the answer, exp(-L)
    exact_memorization, extraction_strength   of the answer
    zlib, min_k, min_k_plus_plus              of the answer, for membership inference
    correct_nll, wrong_nll                    L of the paraphrased answer, mean L of the wrong ones
    truth_ratio, choice_probability           R; the answer's share among all choices
    rouge_l, repetition                       of the reply
    reply_nll, reply_tokens                   L of the reply under the original model, its length
    kl                                        KL(original ‖ model) on the answer's tokens, in nats
    judged_NAME                               what the judge NAME gave the reply
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mollm.errors import UsageError
from mollm.evaluation import metrics
from mollm.evaluation.metrics import Floats
from mollm.evaluation.records import Record

GROUPS = ("forget", "retain", "real_authors", "world_facts")
JUDGED = "judged_"
_COMPARED = ("kl", "reply_nll", "reply_tokens")
_MEMBERSHIP = {
    "mia_loss": "nll",
    "mia_zlib": "zlib",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus_plus",
}


Judges: TypeAlias = "Iterable[str] | Mapping[str, float]"
"""The names of judges, or their thresholds by name."""


@dataclass(frozen=True)
class Need:
    """Scores that a figure is made of: [scores, examples] of one set."""

    group: str
    scores: tuple[str, ...]
    retrained: bool = False
    """Whether they are those of the retain-only model."""


@dataclass(frozen=True)
class Figure:
    """A figure by name: a statistic of one [scores, examples] array for each need."""

    name: str
    needs: tuple[Need, ...]
    statistic: Callable[..., float]


def figures(judges: Judges = ()) -> list[Figure]:
    """All figures there are, with those of the judges by the given names.

    Args:
        judges: Their names, or their thresholds by name.

    Raises:
        UsageError: A judge has the name of something else.
    """
    limits = judges if isinstance(judges, Mapping) else dict.fromkeys(judges, metrics.THRESHOLD)
    found = [
        *(figure for group in GROUPS for figure in _figures_of(group, limits)),
        _mean("exact_memorization", "forget", "exact_memorization"),
        _mean("extraction_strength", "forget", "extraction_strength"),
        *(
            Figure(name, (Need("forget", (score,)), Need("holdout", (score,))), _auc)
            for name, score in _MEMBERSHIP.items()
        ),
        Figure("privleak", _both(("forget", "holdout"), "min_k"), _privleak),
        Figure("forget_quality", _both(("forget",), "truth_ratio"), _forget_quality),
        Figure("model_utility", _utility_needs(), _utility),
    ]
    names = [figure.name for figure in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"a judge's name must not make a figure called {twice[0]}, as there is one already: "
            "choose another name."
        )
    return found


def choose(names: Sequence[str] | None, judges: Judges = ()) -> list[Figure]:
    """The figures by the given names, all of them for None.

    Raises:
        UsageError: There is no figure of such a name, or no name.
    """
    known = {figure.name: figure for figure in figures(judges)}
    if names is not None and not names:
        raise UsageError("metrics must name at least one figure, but got none.")
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UsageError(
            f"metrics must be some of {', '.join(known)}, and for a judge called toxicity "
            f"forget_toxicity, forget_toxicity_rate and the like, but got {unknown[0]!r}."
        )
    return list(known.values()) if names is None else [known[name] for name in names]


def missing_input(
    figure: Figure,
    own: Mapping[str, Iterable[str]],
    retrained: Mapping[str, Iterable[str]],
) -> str | None:
    """Why `figure` cannot be computed from these scores of these sets; None where it can."""
    for need in figure.needs:
        have = retrained if need.retrained else own
        if not have and need.retrained:
            return (
                f"{figure.name} needs the records of a retain-only model: evaluate one on the same "
                "suite and give its examples.jsonl as retain logs."
            )
        absent = [score for score in need.scores if score not in have.get(need.group, ())]
        if absent and need.retrained:
            return (
                f"{figure.name} needs from the retain-only model the score {absent[0]} of every "
                f"example of the set {need.group}: evaluate it on the same suite."
            )
        if need.group not in have:
            return f"{figure.name} needs {_how_to_get_group(need.group)}."
        if absent:
            return f"{figure.name} needs {_how_to_get_score(absent[0], need.group)}."
    return None


def _how_to_get_group(group: str) -> str:
    if group == "holdout":
        return (
            "a holdout set that no model was trained on: give it as holdout, or as holdout10.jsonl "
            "in the data"
        )
    if group in ("real_authors", "world_facts"):
        return f"the set {group}: give the files of TOFU as data"
    return f"the set {group}: give it too"


def _how_to_get_score(score: str, group: str) -> str:
    if score in _COMPARED:
        return (
            "the original model: give the model that unlearning started from, with the same "
            "tokenizer, as original"
        )
    if score in ("truth_ratio", "choice_probability"):
        return f"wrong answers: rows with question, answer and perturbed_answer in the set {group}"
    return f"the score {score} of every example of the set {group}: evaluate it once more"


def _figures_of(group: str, limits: Mapping[str, float]) -> list[Figure]:
    choices = group in ("real_authors", "world_facts")
    ratio = metrics.forget_truth_ratio if group == "forget" else metrics.utility_truth_ratio
    judged = [
        figure
        for name, limit in limits.items()
        for figure in (
            _mean(f"{group}_{name}", group, JUDGED + name),
            Figure(f"{group}_{name}_rate", (Need(group, (JUDGED + name,)),), _flagged_from(limit)),
        )
    ]
    return [
        _mean(f"{group}_probability", group, "choice_probability" if choices else "probability"),
        _mean(f"{group}_rouge_l", group, "rouge_l"),
        Figure(f"{group}_truth_ratio", (Need(group, ("truth_ratio",)),), ratio),
        _mean(f"{group}_repetition", group, "repetition"),
        Figure(f"{group}_perplexity", (Need(group, ("reply_nll", "reply_tokens")),), _perplexity),
        _mean(f"{group}_kl", group, "kl"),
        *judged,
    ]


def _mean(name: str, group: str, score: str) -> Figure:
    return Figure(name, (Need(group, (score,)),), metrics.mean)


def _both(groups: Sequence[str], score: str) -> tuple[Need, ...]:
    return tuple(Need(g, (score,), retrained) for retrained in (False, True) for g in groups)


def _utility_needs() -> tuple[Need, ...]:
    return (
        Need("retain", ("probability", "rouge_l", "truth_ratio")),
        Need("real_authors", ("choice_probability", "rouge_l", "truth_ratio")),
        Need("world_facts", ("choice_probability", "rouge_l", "truth_ratio")),
    )


def _flagged_from(limit: float) -> Callable[..., float]:
    return lambda scores: metrics.flagged_rate(scores[0], limit)


def _perplexity(scores: Floats) -> float:
    return metrics.perplexity(scores[0], scores[1])


def _auc(forget: Floats, holdout: Floats) -> float:
    return metrics.membership_auc(forget[0], holdout[0])


def _privleak(forget: Floats, holdout: Floats, *retrained: Floats) -> float:
    return metrics.privleak(_auc(forget, holdout), _auc(*retrained))


def _forget_quality(ratios: Floats, retrained: Floats) -> float:
    return metrics.forget_quality(ratios[0], retrained[0])


def _utility(*sets: Floats) -> float:
    values = [
        part
        for p, rouge, ratio in sets
        for part in (metrics.mean(p), metrics.mean(rouge), metrics.utility_truth_ratio(ratio))
    ]
    return metrics.model_utility(dict(zip(metrics.UTILITY_PARTS, values, strict=True)))


def columns_of(records: Sequence[Record]) -> dict[str, dict[str, Floats]]:
    """Scores [examples] by set and name: those that every example of the set has."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return {
        group: {
            score: np.array([record.scores[score] for record in members])
            for score in members[0].scores
            if all(score in record.scores for record in members)
        }
        for group, members in groups.items()
    }
