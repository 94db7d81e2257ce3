"""Whether the files of a run hold what `mollm` writes into them, before a page is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.methods.method import OBJECTIVES, role_of_objective
from mollm.system.parsing import parse_json, read_text

ANY = "*"
"""Every name of a mapping."""
NUMBER = "a number"
NUMBER_OR_NONE = "a number or null"

_NUMBERS = {ANY: NUMBER_OR_NONE}
STEP = {
    "losses": _NUMBERS,
    "norms": _NUMBERS,
    "weights": _NUMBERS,
    "cosines": _NUMBERS,
    "conflicts": {ANY: bool},
    "pareto_gap": NUMBER_OR_NONE,
}
RUN = {
    "label": str,
    "failure": (str, type(None)),
    "changes": [{"step": int, "setting": str, "was": object, "is": object}],
    "data": {ANY: {"source": object, "rows": object, "sha256": object}},
    "settings": {"method": object, "learning_rate": object, "seed": object},
    "versions": {ANY: object},
    "notes": [str],
    "steps": int,
    "resumed_at": object,
    "skipped_steps": int,
    "device": object,
    "processes": int,
    "seconds": NUMBER,
    "peak_memory_gib": object,
    "evaluations": [{"step": object}],
    "replies": [{"set": str, "question": str, "answer": str, "before": str, "after": str}],
    "commit": object,
    "finished": object,
}
RELIED_ON = {"settings": dict, "model": (str, type(None)), "given": {ANY: str}}
"""Of run.json, what every command goes by that reads one."""
SPOKEN = {
    "system_prompt": (str, type(None)),
    "chat_template_kwargs": (dict, type(None)),
    "prompt_format": (str, dict, type(None)),
    "long_rows": str,
}
"""Of its settings, those by which a model is asked."""
ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "examples": int}
METRICS = {"metrics": {ANY: ESTIMATE}}
MANIFEST = {"data": {"retain": {ANY: str}}}
REQUEST = {
    "number": int,
    "forget": (str, dict),
    "sha256": str,
    "rows": int,
    "added": str,
    "note": str,
    "status": str,
    "tests": [{"run": str}],
    **dict.fromkeys(
        ("run", "before", "weights_sha256", "verdict", "manifest_sha256", "reason", "dropped"),
        (str, type(None)),
    ),
}
LEDGER = {
    "model": str,
    "retain": (str, dict),
    "settings": dict,
    "requests": [dict],
}
CURVE = {"kind": str, "suite": str, "model": dict, "settings": dict, "retain": dict, "forget": list}

_MOST_BYTES = 1 << 28


def read_written(path: Path, kind: Any, writer: str, most_bytes: int = _MOST_BYTES) -> Any:
    """The value of a JSON file that `mollm` has written.

    Args:
        path: The file.
        kind: What it should hold, see `fault_in`.
        writer: The command that wrote it, such as `mollm unlearn`.
        most_bytes: More than it can have.

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    found = parse_json(read_text(path, most_bytes), str(path))
    fault = fault_in(found, kind)
    if fault is not None:
        raise UsageError(
            f"{path} must be as `{writer}` wrote it, but its {fault or 'whole'} is not."
        )
    return found


def fault_in(value: Any, kind: Any, place: str = "") -> str | None:
    """Where a value of a JSON file is not what it should be; None where all is well.

    Args:
        value: The value.
        kind: A type or several, a number, a list of one kind, or a mapping of kinds by name.
        place: Where the value is.
    """
    if kind in (NUMBER, NUMBER_OR_NONE):
        known = isinstance(value, int | float) and math.isfinite(value)
        return None if known or (value is None and kind == NUMBER_OR_NONE) else place
    if isinstance(kind, list):
        if not isinstance(value, list):
            return place
        faults = (fault_in(item, kind[0], f"{place}[{i}]") for i, item in enumerate(value))
    elif isinstance(kind, dict):
        if not isinstance(value, Mapping):
            return place
        wanted = dict.fromkeys(value, kind[ANY]) if ANY in kind else kind
        for name in wanted:
            if name not in value:
                return f"{place}.{name}".lstrip(".")
        faults = (
            fault_in(value[name], part, f"{place}.{name}".lstrip("."))
            for name, part in wanted.items()
        )
    else:
        return None if isinstance(value, kind) else place
    return next((fault for fault in faults if fault is not None), None)


def fault_in_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first step that is not as it should be, and what of it; None where all is well."""
    for number, step in enumerate(steps):
        fault = fault_in(step, STEP, "")
        if fault is not None:
            return number, fault or "whole"
        names = set(steps[0]["losses"])
        if any(role_of_objective(name) not in OBJECTIVES for name in names):
            return number, "losses"
        for part in ("losses", "norms", "weights", "conflicts"):
            skipped = part == "conflicts" and not step[part]
            if set(step[part]) != names and not skipped:
                return number, part
    return None
