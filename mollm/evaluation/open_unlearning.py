"""The results of open-unlearning, TOFU_EVAL.json, as logs of a retain-only model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.evaluation.records import Record
from mollm.system.parsing import is_file, parse_json, read_text

if TYPE_CHECKING:
    from mollm.evaluation.suite import Row

EVAL_FILE = "TOFU_EVAL.json"
_RATIO = "forget_truth_ratio"
_MIN_K = "mia_min_k"
_REPLIES = "forget_Q_A_ROUGE"
_BYTES = 1 << 30


def eval_file(path: Path) -> Path | None:
    """The file of that name, or in that folder; None where it is another one's."""
    file = path / EVAL_FILE if path.is_dir() else path
    return file if file.suffix == ".json" and is_file(file) else None


def read_eval(path: Path, groups: Mapping[str, Sequence[Row]]) -> tuple[Record, ...]:
    """Records of the forget and the holdout set, with the scores that comparisons need.

    R of each forget question, for forget_quality, and Min-K of the rows of both sets, for privleak;
    what the file does not hold is left out.

    Args:
        path: The file.
        groups: The rows of the sets that the figures are about, in the order of the data set.

    Raises:
        UsageError: The file is none of open-unlearning's, or about other rows.
    """
    found = parse_json(read_text(path, _BYTES), str(path))
    if not isinstance(found, dict) or not {_RATIO, _MIN_K} & set(found):
        raise UsageError(
            f"{path} must be a {EVAL_FILE} of open-unlearning, with {_RATIO} or {_MIN_K}, but it "
            "is not."
        )
    forget = groups.get("forget", ())
    scores: dict[str, dict[str, list[float]]] = {"forget": {}, "holdout": {}}
    if _RATIO in found:
        scores["forget"]["truth_ratio"] = _by_index(found[_RATIO], forget, path, "forget")
    for group in scores:
        part = found.get(_MIN_K, {})
        if isinstance(part, dict) and group in part and group in groups:
            scores[group]["min_k"] = _by_index(part[group], groups[group], path, group)
    _check_questions(found.get(_REPLIES), forget, path)
    return tuple(
        Record(
            group,
            row.question,
            row.answer,
            None,
            {name: values[i] for name, values in scores[group].items()},
        )
        for group in scores
        if scores[group]
        for i, row in enumerate(groups[group])
    )


def _by_index(figure: Any, rows: Sequence[Row], path: Path, group: str) -> list[float]:
    try:
        values = figure["value_by_index"]
        found = [float(values[str(i)]["score"]) for i in range(len(values))]
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} must hold the score of every {group} example under value_by_index, but does "
            "not: evaluate the retain-only model again with open-unlearning."
        ) from error
    if len(found) != len(rows):
        raise UsageError(
            f"{path} must be about the same {group} examples, but is about {len(found)}, and the "
            f"set holds {len(rows)}: take the same split, without a limit."
        )
    return found


def _check_questions(replies: Any, rows: Sequence[Row], path: Path) -> None:
    """Refuses results about other questions, where the file has what was asked."""
    values = replies.get("value_by_index") if isinstance(replies, dict) else None
    for i, row in enumerate(rows):
        said = values.get(str(i), {}).get("input") if isinstance(values, dict) else None
        if isinstance(said, str) and row.question.strip() not in said:
            raise UsageError(
                f"{path} must be about the same forget questions in the same order, but its "
                f"example {i} does not ask {row.question!r}: take the same split."
            )
