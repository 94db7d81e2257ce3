"""The model card of a run: which data, which settings, and what every step weighed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mollm.report.markdown import as_code, as_text
from mollm.system.folders import public, public_name
from mollm.training.history import StepRecord, skipped_in

_ROWS = 20


def model_card(
    *,
    base_model: str,
    data: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    history: Sequence[StepRecord],
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
    changes: Sequence[Mapping[str, Any]] = (),
    failure: str | None = None,
) -> str:
    """Markdown with a header that the Hugging Face hub reads.

    Whatever is given here shows as the text that it is: neither Markdown nor HTML in it acts. Of
    paths on this machine the last part is shown alone.

    Args:
        base_model: What unlearning started from.
        data: For each set its source, the number of its rows and their hash.
        settings: By name.
        history: A record for every step; some twenty of them are shown.
        versions: Of the packages.
        notes: Sentences for the reader.
        changes: Settings that changed where the run was resumed: `step`, `setting`, `was`, `is`.
        failure: Why the run is no success.
    """
    base_model = public_name(base_model)
    names = list(history[0].losses) if history else []
    sentences = [*notes]
    if failure is not None:
        sentences.insert(0, f"This run failed: {failure}")
    skipped = skipped_in(history)
    if skipped:
        sentences.append(
            f"{skipped} of {len(history)} steps were skipped, because a gradient was not finite."
        )
    parts = [
        f"---\nlibrary_name: transformers\nbase_model: {_header(base_model)}\n"
        "tags:\n- unlearning\n- mollm\n---",
        f"# {as_text(base_model)}, after unlearning",
        "Made with mollm ([arXiv 2412.20412](https://arxiv.org/abs/2412.20412)): gradients of a "
        "loss on what is to be forgotten, of the KL divergence to the original and of the "
        "cross-entropy on what is to be retained, combined by the method named below. What the "
        "model no longer says may still be in its weights.",
        *map(as_text, sentences),
        "## Data",
        _table(
            ("set", "source", "rows", "SHA-256 of its contents"),
            [
                (as_text(name), as_text(public(d["source"])), d["rows"], as_code(d["sha256"]))
                for name, d in data.items()
            ],
        ),
        "## Settings",
        _table(
            ("setting", "value"), [(as_code(k), as_code(public(v))) for k, v in settings.items()]
        ),
        *_changed(changes),
        "## Weights",
        f"{len(history)} steps; losses before each, and the weights of the gradients. All "
        "steps are in `history.jsonl`.",
        _table(
            ("step", *(f"{n} loss" for n in names), *(f"w {n}" for n in names)),
            [
                (
                    record.step + 1,
                    *(f"{record.losses[n]:.4g}" for n in names),
                    *(f"{record.weights[n]:.3g}" for n in names),
                )
                for record in _some(history)
            ],
        ),
        "## Versions",
        _table(("package", "version"), [(as_text(k), as_text(v)) for k, v in versions.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _some(history: Sequence[StepRecord]) -> list[StepRecord]:
    stride = max(1, -(-len(history) // _ROWS))
    places = sorted({*range(0, len(history), stride), len(history) - 1} - {-1})
    return [history[place] for place in places]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _changed(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not changes:
        return []
    return [
        "These settings are those of the last steps. The run was resumed with other ones than it "
        "had before:",
        _table(
            ("from step", "setting", "before", "from then on"),
            [
                (
                    c["step"] + 1,
                    as_code(c["setting"]),
                    as_code(public(c["was"])),
                    as_code(public(c["is"])),
                )
                for c in changes
            ],
        ),
    ]


def _header(name: str) -> str:
    """A JSON text, which is one of YAML too, whatever stands in it, and of no HTML."""
    return json.dumps(name).replace("<", "\\u003c").replace(">", "\\u003e")
