"""run.json: what a run was asked for and how it went, for the commands that come after it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.report.written import RELIED_ON, SPOKEN, fault_in
from mollm.system.folders import replace_text
from mollm.system.parsing import is_file, parse_json, parse_yaml, read_text, user_path

RUN_FILE = "run.json"
FORMAT = 1
_CARD = "README.md"
_CARD_BYTES = 1 << 24


def write_run(facts: Mapping[str, Any], folder: Path) -> None:
    """Writes run.json into the folder of a run."""
    text = json.dumps({"format": FORMAT, **facts}, indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(folder / RUN_FILE, text + "\n")


def read_run(folder: Path | str) -> dict[str, Any]:
    """What `write_run` wrote.

    Args:
        folder: That of a run, or that of the model in it.

    Raises:
        UsageError: It is no folder of a run, of a later release, or damaged.
    """
    path = _find(user_path(folder))
    if path is None:
        raise UsageError(
            f"a run must be a folder that `mollm unlearn` wrote, with a {RUN_FILE}, but {folder} "
            "has none."
        )
    facts = parse_json(read_text(path), str(path))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UsageError(
            f"{path} must be of format {FORMAT}, but it is not: read it with the release that "
            "wrote it."
        )
    settings = facts.get("settings")
    known = settings if isinstance(settings, Mapping) else {}
    fault = fault_in({"given": {}, "model": None, **facts}, RELIED_ON) or fault_in(
        known, {name: kind for name, kind in SPOKEN.items() if name in known}, "settings"
    )
    if fault is not None:
        raise UsageError(
            f"{path} must be as `mollm unlearn` wrote it, but its {fault} is not: remove it, or "
            "take it from a backup."
        )
    return {**facts, "folder": str(path.parent)}


def run_of(model: str) -> dict[str, Any] | None:
    """The facts of the run that made a model; None where they are not beside it."""
    return read_run(model) if _find(user_path(model)) is not None else None


def model_of(name: str) -> str:
    """The model of that name: of the folder of a run, the model in it."""
    path = user_path(name)
    inner = path / "model"
    return str(inner) if is_file(path / RUN_FILE) and inner.is_dir() else name


def original_of(model: str) -> str | None:
    """What a model was unlearned from, by its run, else by its card; None where neither says.

    A card names no path on this machine, so that of a local original says nothing.
    """
    run = run_of(model)
    if run is not None:
        named = run.get("model")
        return named if isinstance(named, str) else None
    card = user_path(model) / _CARD
    if not is_file(card):
        return None
    header = re.match(r"---\n(.*?)\n---\n", read_text(card, _CARD_BYTES), re.DOTALL)
    said = parse_yaml(header[1], str(card)) if header else None
    base = said.get("base_model") if isinstance(said, dict) else None
    return base if isinstance(base, str) and base.count("/") == 1 else None


def _find(path: Path) -> Path | None:
    places = [path / RUN_FILE]
    if path.name == "model":
        places.append(path.parent / RUN_FILE)
    return next((place for place in places if is_file(place)), None)
