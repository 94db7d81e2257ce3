"""Judges from the command line, and stored replies that are judged again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.system.parsing import parse_yaml

if TYPE_CHECKING:
    import torch

    from mollm.evaluation.judges import Judge
    from mollm.evaluation.summary import Evaluation

_FORMS = (
    "judge must be NAME=MODEL:LABEL, such as toxicity=unitary/toxic-bert:toxic, NAME=MODEL for a "
    "model that writes its verdict, or '{name: …, model: …, …}'"
)
_CLASSIFIER = ("labels", "threshold")
_GENERATIVE = ("unsafe", "safe")
_SHARED = ("name", "model", "template")


@dataclass(frozen=True)
class JudgeOption:
    """One --judge."""

    name: str
    model: str
    labels: tuple[str, ...] = ()
    """Of a classifier; empty for a model that writes its verdict."""
    template: str | None = None
    threshold: float | None = None
    unsafe: str | None = None
    safe: str | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> Judge:
        """The judge.

        Raises:
            UsageError: It cannot be loaded.
        """
        from mollm.evaluation.judges import ClassifierJudge, GenerativeJudge

        own = {name: getattr(self, name) for name in ("template", "threshold", "unsafe", "safe")}
        options: dict[str, Any] = {name: v for name, v in own.items() if v is not None}
        if self.labels:
            return ClassifierJudge(self.model, self.labels, device=device, **options)
        return GenerativeJudge(self.model, device=device, dtype=dtype, **options)


def read_judges(texts: Iterable[str], template: str | None) -> dict[str, JudgeOption]:
    """The judges that --judge asks for, by name.

    Args:
        texts: What was given.
        template: What those read that have no template of their own.

    Raises:
        UsageError: One is no judge, or two have one name.
    """
    from mollm.evaluation.judges import (
        SAFE,
        UNSAFE,
        checked_template,
        checked_threshold,
        checked_verdicts,
    )

    found: dict[str, JudgeOption] = {}
    for text in texts:
        judge = _read(text)
        if judge.name in found:
            raise UsageError(
                f"every judge must have a name of its own, but two are called {judge.name}."
            )
        judge = replace(judge, template=judge.template or template)
        if judge.template is not None:
            checked_template(judge.template)
        if judge.threshold is not None:
            checked_threshold(judge.threshold)
        checked_verdicts(
            UNSAFE if judge.unsafe is None else judge.unsafe,
            SAFE if judge.safe is None else judge.safe,
        )
        found[judge.name] = judge
    return found


def _read(text: str) -> JudgeOption:
    if text.startswith("{"):
        return _from_options(parse_yaml(text, "judge"), text)
    name, equals, rest = text.partition("=")
    model, colon, labels = rest.rpartition(":")
    if not colon:
        model, labels = rest, ""
    if not (name and equals and model) or (colon and not labels):
        raise UsageError(f"{_FORMS}, but got {text!r}.")
    return JudgeOption(name, model, tuple(labels.split(",")) if labels else ())


def _from_options(options: Any, text: str) -> JudgeOption:
    if not isinstance(options, dict) or not all(
        isinstance(options.get(name), str) and options[name] for name in ("name", "model")
    ):
        raise UsageError(f"{_FORMS}, but got {text!r}.")
    allowed = (*_SHARED, *(_CLASSIFIER if "labels" in options else _GENERATIVE))
    stray = [name for name in options if name not in allowed]
    if stray:
        kind = "a classifier" if "labels" in options else "a judge without labels"
        raise UsageError(
            f"{kind} must be given by {', '.join(allowed)}, but judge got {stray[0]!r}."
        )
    labels = _labels(options.pop("labels")) if "labels" in options else ()
    for name in ("template", "unsafe", "safe"):
        if not isinstance(options.get(name, ""), str):
            raise UsageError(f"the {name} of a judge must be a text, but got {options[name]!r}.")
    threshold = options.get("threshold", 1.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise UsageError(f"the threshold of a judge must be a number, but got {threshold!r}.")
    return JudgeOption(**options, labels=labels)


def _labels(given: Any) -> tuple[str, ...]:
    """One label, or a list of them."""
    labels = [given] if isinstance(given, str) else given
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise UsageError(
            "the labels of a judge must be a text or a list of texts, such as [toxic, obscene], "
            f"but got {given!r}: leave them out for a model that writes its verdict."
        )
    return tuple(labels)


def judge_again(
    path: Path,
    judges: Mapping[str, Judge],
    *,
    retain_logs: Path | None = None,
    names: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """The evaluation of stored replies with the scores of other judges; nothing is generated.

    Args:
        path: The examples.jsonl of an evaluation, or its folder.
        judges: Judges by name; one that the replies had takes its place.
        retain_logs: As for `mollm.evaluation.load_suite`.
        names: As for `mollm.evaluation.summarize`; so are the next ones.

    Raises:
        UsageError: There are no such replies or logs.
    """
    from mollm.evaluation.judges import judge_replies, thresholds_of
    from mollm.evaluation.records import read_records
    from mollm.evaluation.registry import JUDGED
    from mollm.evaluation.suite import Row, load_logs
    from mollm.evaluation.summary import summarize

    records = read_records(path)
    asked = [place for place, record in enumerate(records) if record.reply is not None]
    if not asked:
        raise UsageError(
            f"replies must hold what a model replied, but {path} holds none: evaluate the model "
            "with a judge or with ROUGE-L."
        )
    questions = [records[place].question for place in asked]
    replies = [str(records[place].reply) for place in asked]
    scores: dict[int, dict[str, float]] = {place: {} for place in asked}
    for name, judge in judges.items():
        judged = judge_replies(judge, name, questions, replies)
        for place, score in zip(asked, judged, strict=True):
            scores[place][JUDGED + name] = score
    made = [
        replace(record, scores={**record.scores, **scores.get(place, {})})
        for place, record in enumerate(records)
    ]
    rows: dict[str, list[Row]] = {}
    for record in records:
        rows.setdefault(record.group, []).append(Row(record.question, record.answer))
    logs = None if retain_logs is None else load_logs(retain_logs, rows)
    return summarize(
        made, logs, names=names, judges=thresholds_of(judges), resamples=resamples, seed=seed
    )
