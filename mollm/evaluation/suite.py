"""What TOFU asks a model, read from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mollm import data
from mollm.errors import UsageError
from mollm.evaluation.records import Record, read_records

_ENDINGS = (".jsonl", ".json", ".parquet")
_ON_HUB = "locuslab/TOFU"


@dataclass(frozen=True)
class Row:
    """One question of a set."""

    question: str
    answer: str
    paraphrased_answer: str | None = None
    """The answer in the words of the perturbed answers; where None, the answer stands for it."""
    perturbed_answers: tuple[str, ...] = ()
    """Wrong answers: in the same words, or the other choices of a multiple-choice question."""


@dataclass(frozen=True)
class TofuSuite:
    """The sets of TOFU (arXiv 2401.06121).

    Raises:
        UsageError: A set holds fewer than two rows, or a row without what the set needs.
    """

    forget: Sequence[Row]
    retain: Sequence[Row]
    real_authors: Sequence[Row]
    world_facts: Sequence[Row]
    holdout: Sequence[Row] | None = None
    """Rows like those of the forget set that no model was trained on, for membership inference."""
    retain_logs: Sequence[Record] | None = None
    """The records of a model trained without the forget set, evaluated on this suite."""

    def __post_init__(self) -> None:
        for name, rows in self.groups().items():
            if len(rows) < 2:
                raise UsageError(
                    f"the set {name} must hold at least 2 rows for a confidence interval, but got "
                    f"{len(rows)}."
                )
            lacking = [row.question for row in rows if not row.perturbed_answers]
            if name != "holdout" and lacking:
                raise UsageError(
                    f"every row of the set {name} must have perturbed answers, but {lacking[0]!r} "
                    "has none: use the files that TOFU names *_perturbed."
                )

    def groups(self) -> dict[str, Sequence[Row]]:
        """The sets that are there, by name."""
        groups = {
            "forget": self.forget,
            "retain": self.retain,
            "real_authors": self.real_authors,
            "world_facts": self.world_facts,
        }
        return groups if self.holdout is None else groups | {"holdout": self.holdout}


def load_tofu(
    folder: Path | str,
    *,
    forget_split: str = "forget10",
    retain_logs: Path | str | None = None,
    limit: int | None = None,
) -> TofuSuite:
    """Reads the suite from a folder with the files of TOFU, or from the hub.

    The files are .jsonl, .json or .parquet; they, or the configs of the data set on the hub,
    are named {forget_split}_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed and, where it is there, holdout10 or the like, of the size of the forget
    set. A row holds question, answer, the list perturbed_answer and, in the first two,
    paraphrased_answer.

    Args:
        folder: Where the files are, or a name on the hub, such as locuslab/TOFU.
        forget_split: "forget01", "forget05" or "forget10".
        retain_logs: The folder or examples.jsonl of a retain-only model's evaluation.
        limit: How many rows of each file to take, from its beginning; None for all.

    Raises:
        UsageError: A file is missing or a row is not as above.
    """
    if limit is not None and limit < 2:
        raise UsageError(f"limit must be at least 2, but got {limit}.")
    find = _finder(folder)

    def read(name: str, paraphrased: bool = False) -> tuple[Row, ...]:
        found = find(name)
        if found is None:
            raise UsageError(
                f"data must be a folder with {name}.jsonl, but {folder} has none: take the files "
                f"of the data set {_ON_HUB}, or name that."
            )
        records = data.load_records(found[0], role="retain", schema="tofu", config=found[1])
        return tuple(_row(record, paraphrased) for record in records[:limit])

    holdout = forget_split.replace("forget", "holdout")
    return TofuSuite(
        forget=read(f"{forget_split}_perturbed", paraphrased=True),
        retain=read("retain_perturbed", paraphrased=True),
        real_authors=read("real_authors_perturbed"),
        world_facts=read("world_facts_perturbed"),
        holdout=read(holdout) if find(holdout) is not None else None,
        retain_logs=None if retain_logs is None else read_records(retain_logs),
    )


_Finder = Callable[[str], tuple[str, str | None] | None]
"""From the name of a set to its source and config, None where there is none."""


def _finder(folder: Path | str) -> _Finder:
    path = Path(folder).expanduser()
    if not path.exists() and str(folder).count("/") == 1:
        return lambda name: (str(folder), name)

    def find(name: str) -> tuple[str, None] | None:
        files = (path / f"{name}{ending}" for ending in _ENDINGS)
        return next(((str(file), None) for file in files if file.is_file()), None)

    return find


def _row(record: data.Record, paraphrased: bool) -> Row:
    other = record.extra.get("paraphrased_answer")
    if paraphrased and other is None:
        raise UsageError(
            f"{record.place} must have the field paraphrased_answer, but it has none: use the "
            "files that TOFU names *_perturbed."
        )
    wrong = tuple(record.extra.get("perturbed_answer", ()))
    return Row(record.prompt, record.answer, str(other) if paraphrased else None, wrong)
