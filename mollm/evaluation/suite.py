"""What TOFU asks a model, read from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mollm.errors import UsageError
from mollm.evaluation.records import Record, read_json_lines, read_records

_ENDINGS = (".jsonl", ".json")


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
    """Reads the suite from a folder with the files of TOFU, JSON lines named .jsonl or .json.

    They are {forget_split}_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed and, where it is there, the holdout file of the same size, such as
    holdout10. A line holds question, answer, the list perturbed_answer and, in the first two,
    paraphrased_answer.

    Args:
        folder: Where the files are.
        forget_split: "forget01", "forget05" or "forget10".
        retain_logs: The folder or examples.jsonl of a retain-only model's evaluation.
        limit: How many rows of each file to take, from its beginning; None for all.

    Raises:
        UsageError: A file is missing or a line is not as above.
    """
    folder = Path(folder)
    if limit is not None and limit < 2:
        raise UsageError(f"limit must be at least 2, but got {limit}.")

    def read(name: str, paraphrased: bool = False) -> tuple[Row, ...]:
        return _read_rows(_find(folder, name), paraphrased)[:limit]

    holdout = forget_split.replace("forget", "holdout")
    has_holdout = any((folder / f"{holdout}{ending}").is_file() for ending in _ENDINGS)
    return TofuSuite(
        forget=read(f"{forget_split}_perturbed", paraphrased=True),
        retain=read("retain_perturbed", paraphrased=True),
        real_authors=read("real_authors_perturbed"),
        world_facts=read("world_facts_perturbed"),
        holdout=read(holdout) if has_holdout else None,
        retain_logs=None if retain_logs is None else read_records(retain_logs),
    )


def _find(folder: Path, name: str) -> Path:
    for ending in _ENDINGS:
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise UsageError(
        f"data must be a folder with {name}.jsonl, but {folder} has none: take the files of the "
        "data set locuslab/TOFU."
    )


def _read_rows(path: Path, paraphrased: bool) -> tuple[Row, ...]:
    rows = []
    for place, fields in read_json_lines(path):
        wrong = fields.get("perturbed_answer") or []
        texts = [fields.get("question"), fields.get("answer")]
        texts += [fields.get("paraphrased_answer")] if paraphrased else []
        texts += wrong if isinstance(wrong, list) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            expected = "question, answer" + (", paraphrased_answer" if paraphrased else "")
            raise UsageError(
                f"{place} must have the texts {expected} and the list perturbed_answer, none of "
                "them empty."
            )
        question, answer, *others = map(str, texts)
        rows.append(
            Row(question, answer, others[0], tuple(others[1:]))
            if paraphrased
            else Row(question, answer, None, tuple(others))
        )
    return tuple(rows)
