"""The model card of a run: which data, which settings, and what every step weighed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mollm.methods.method import OBJECTIVES
from mollm.training.history import StepRecord

_ROWS = 20


def model_card(
    *,
    base_model: str,
    data: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    history: Sequence[StepRecord],
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """Markdown with a header that the Hugging Face hub reads.

    Args:
        base_model: What unlearning started from.
        data: For each set its source, the number of its rows and their hash.
        settings: By name.
        history: A record for every step; some twenty of them are shown.
        versions: Of the packages.
        notes: Sentences for the reader.
    """
    parts = [
        # A JSON text is one of YAML too, whatever stands in it.
        f"---\nlibrary_name: transformers\nbase_model: {json.dumps(base_model)}\n"
        "tags:\n- unlearning\n- mollm\n---",
        f"# {base_model}, after unlearning",
        "Made with mollm ([arXiv 2412.20412](https://arxiv.org/abs/2412.20412)): gradients of a "
        "loss on what is to be forgotten, of the KL divergence to the original and of the "
        "cross-entropy on what is to be retained, combined by the method named below. What the "
        "model no longer says may still be in its weights.",
        *notes,
        "## Data",
        _table(
            ("set", "source", "rows", "SHA-256 of its contents"),
            [(name, d["source"], d["rows"], f"`{d['sha256']}`") for name, d in data.items()],
        ),
        "## Settings",
        _table(("setting", "value"), [(f"`{k}`", f"`{v}`") for k, v in settings.items()]),
        "## Weights",
        f"{len(history)} steps; losses before each, and the weights of the three gradients. All "
        "steps are in `history.jsonl`.",
        _table(
            ("step", *(f"{n} loss" for n in OBJECTIVES), *(f"w {n}" for n in OBJECTIVES)),
            [
                (
                    record.step + 1,
                    *(f"{record.losses[n]:.4g}" for n in OBJECTIVES),
                    *(f"{record.weights[n]:.3g}" for n in OBJECTIVES),
                )
                for record in _some(history)
            ],
        ),
        "## Versions",
        _table(("package", "version"), list(versions.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _some(history: Sequence[StepRecord]) -> list[StepRecord]:
    stride = max(1, -(-len(history) // _ROWS))
    places = sorted({*range(0, len(history), stride), len(history) - 1} - {-1})
    return [history[place] for place in places]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split("\n"))
