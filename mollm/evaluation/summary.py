"""An evaluation: figures with confidence intervals, made of records, written and read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mollm.errors import UsageError
from mollm.evaluation import metrics
from mollm.evaluation.reading import by_theme, reading_of, verdict_of
from mollm.evaluation.records import EXAMPLES_FILE, Record, read_records, write_records
from mollm.evaluation.registry import Judges, choose, columns_of, missing_input
from mollm.system.folders import replace_text
from mollm.system.parsing import parse_json, read_text
from mollm.system.tables import html_table
from mollm.system.terminal import paint

METRICS_FILE = "metrics.json"
_HARMFUL = "forget_harmful_rate"
_NO_JUDGE = (
    f"{_HARMFUL} needs a judge of replies called harmful: give a classifier, as judges of toxicity "
    "and obscenity too, such as toxicity=unitary/toxic-bert:toxic."
)


@dataclass(frozen=True)
class Estimate:
    """A figure with its percentile bootstrap interval, examples resampled within each set, with
    the scores of both models where there are two."""

    value: float
    low: float
    high: float
    examples: int
    """How many examples of the first set it is about."""


@dataclass(frozen=True)
class Evaluation:
    """Records and the figures made of them.

    Example:
        >>> made = [Record("forget", "?", "!", None, {"nll": x}) for x in (0.5, 1.5)]
        >>> found = Evaluation(tuple(made), {"nll": Estimate(1.0, 0.5, 1.5, 2)}, missing={})
        >>> found["nll"].low, found.value("nll")
        (0.5, 1.0)
    """

    records: tuple[Record, ...]
    estimates: Mapping[str, Estimate]
    missing: Mapping[str, str]
    """For each figure that could not be computed, what it needs and how to get it."""

    def __getitem__(self, name: str) -> Estimate:
        """The figure `name`.

        Raises:
            UsageError: It was not computed; the error says what it needs.
        """
        if name in self.estimates:
            return self.estimates[name]
        raise UsageError(
            self.missing.get(name)
            or f"{name} was not computed; these were: {', '.join(self.estimates)}."
        )

    def value(self, name: str) -> float:
        """The value of the figure `name`; raises as `[name]` does."""
        return self[name].value

    def table(
        self, original: Evaluation | None = None, *, explain: bool = False, colour: bool = False
    ) -> str:
        """The figures by what they are about, one a line, with an arrow for which way is good.

        Args:
            original: The evaluation of the original model, to stand beside this one.
            explain: Whether to say why figures are missing, and how to get them.
            colour: Whether a change beyond the interval is coloured.
        """
        models = {"original": original, "result": self} if original else {"": self}
        names = dict.fromkeys(n for found in models.values() for n in found.estimates)
        cells = {
            name: [_cell(found.estimates.get(name)) for found in models.values()] for name in names
        }
        first = max((len(f"{n} {reading_of(n).good}") for n in names), default=0) + 2
        width = max((len(cell) for row in cells.values() for cell in row), default=0)
        lines = []
        if original is not None:
            lines.append(" " * (first + 2) + "  ".join(f"{m:<{width}}" for m in models).rstrip())
        for theme, some in by_theme(names).items():
            lines.append(theme)
            for name in some:
                before = None if original is None else original.estimates.get(name)
                verdict = verdict_of(name, before, self.estimates.get(name))
                last = f"{cells[name][-1]:<{width}}"
                style = {"better": "good", "worse": "bad"}.get(verdict)
                shown = paint(last, style, colour=colour) if style else last
                label = f"{name} {reading_of(name).good}"
                row = "  ".join(
                    [*(f"{cell:<{width}}" for cell in cells[name][:-1]), shown, verdict]
                )
                lines.append(f"  {label:<{first}}{row}".rstrip())
        return "\n".join([*lines, *self._missing_lines(explain)])

    def html(self, original: Evaluation | None = None) -> str:
        """The same table as HTML, as a notebook shows it.

        Args:
            original: The evaluation of the original model, to stand beside this one.
        """
        models = {"original": original, "result": self} if original else {"value": self}
        names = dict.fromkeys(n for found in models.values() for n in found.estimates)
        rows: list[tuple[str, ...]] = []
        for theme, some in by_theme(names).items():
            rows.append((theme,))
            for name in some:
                before = None if original is None else original.estimates.get(name)
                cells = [_cell(found.estimates.get(name)) for found in models.values()]
                verdict = verdict_of(name, before, self.estimates.get(name))
                rows.append((f"{name} {reading_of(name).good}", *cells, verdict))
        return html_table(("", *models, ""), rows, caption=" ".join(self._missing_lines(False)))

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return self.html()

    def _missing_lines(self, explain: bool) -> list[str]:
        if not self.missing:
            return []
        if not explain:
            count = len(self.missing)
            return [f"not computed: {count} figures (--explain names them, and what they need)"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            reasons.setdefault(reason.partition(" needs ")[2], []).append(name)
        return [f"not computed: {', '.join(n)}: needs {r}" for r, n in reasons.items()]

    def write(self, folder: Path) -> None:
        """Writes examples.jsonl and metrics.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_records(self.records, folder / EXAMPLES_FILE)
        figures = {
            "metrics": {name: asdict(estimate) for name, estimate in self.estimates.items()},
            "missing": dict(self.missing),
        }
        text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
        replace_text(folder / METRICS_FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path | str) -> Evaluation:
        """What `write` wrote, equal to the last bit.

        Raises:
            UsageError: A file is missing or something else.
        """
        path = Path(folder) / METRICS_FILE
        try:
            figures = parse_json(read_text(path), str(path))
            estimates = {name: Estimate(**entry) for name, entry in figures["metrics"].items()}
            return cls(read_records(folder), estimates, figures["missing"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{folder} must be a folder that an evaluation was written to, but its "
                f"{METRICS_FILE} cannot be read: {error}."
            ) from error


def remove_evaluation(folder: Path) -> None:
    """Removes what `Evaluation.write` wrote into `folder`, and the folder if nothing else is in
    it; one that holds no evaluation stays as it is."""
    if (folder / METRICS_FILE).is_file():
        for name in (METRICS_FILE, EXAMPLES_FILE):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:>6.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def summarize(
    records: Sequence[Record],
    retain_logs: Sequence[Record] | None = None,
    *,
    names: Sequence[str] | None = None,
    judges: Judges = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Computes figures from records.

    The interval of forget_quality is that of a p-value under resampling, which tends to be lower
    than the p-value itself: read it as a spread.

    Args:
        records: Those of the model.
        retain_logs: Those of a retain-only model on the same forget set; None where there is none.
        names: Which figures; None for all that the records allow.
        judges: The names of the judges whose scores the records hold, or their thresholds by name.
        resamples: Resamples of each interval.
        seed: Of the resampling.

    Raises:
        UsageError: A figure that was named cannot be computed, or a score is not finite.

    Example:
        >>> made = [Record("forget", "?", "!", None, {"probability": p}) for p in (0.1, 0.3)]
        >>> summarize(made, names=["forget_probability"]).value("forget_probability")
        0.2
    """
    own, retrained = columns_of(records), columns_of(retain_logs or ())
    check_same_questions(_questions(records), retain_logs)
    estimates: dict[str, Estimate] = {}
    missing: dict[str, str] = {} if judges or names is not None else {_HARMFUL: _NO_JUDGE}
    for figure in choose(names, judges):
        reason = missing_input(figure, own, retrained)
        if reason and names is not None:
            raise UsageError(reason)
        if reason:
            missing[figure.name] = reason
            continue
        samples = [
            np.stack([(retrained if need.retrained else own)[need.group][s] for s in need.scores])
            for need in figure.needs
        ]
        sets = [need.group for need in figure.needs]
        low, high = metrics.bootstrap_interval(
            figure.statistic, *samples, sets=sets, resamples=resamples, seed=seed
        )
        value = figure.statistic(*samples)
        estimates[figure.name] = Estimate(value, low, high, samples[0].shape[1])
    return Evaluation(tuple(records), estimates, missing)


def check_same_questions(
    questions: Mapping[str, Sequence[str]],
    retain_logs: Sequence[Record] | None,
    *,
    skipped: bool = False,
) -> None:
    """Refuses logs of a retain-only model that are about other questions than these, by set.

    Args:
        questions: Those of each set.
        retain_logs: The logs.
        skipped: Whether the logs may lack some of the questions, which were too long.
    """
    logged = _questions(retain_logs or ())
    for group in ("forget", "holdout"):
        here, there = questions.get(group), logged.get(group)
        rest = iter(here or ())
        same = all(text in rest for text in there) if here and there and skipped else None
        if here and there and not (list(here) == there if same is None else same):
            raise UsageError(
                f"the retain logs must be about the same {group} questions in the same order, but "
                f"those {len(there)} differ from these {len(here)}: evaluate the retain-only model "
                "on this suite."
            )


def _questions(records: Sequence[Record]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record.question)
    return groups
