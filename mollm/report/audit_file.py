"""The verdict of an audit, for the report and the model card of the run whose model it attacked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.report.markdown import as_text
from mollm.system.folders import replace_text
from mollm.system.parsing import is_file, parse_json, read_text

AUDIT = "audit"
"""The folder of a run that `mollm audit` writes to."""
AUDIT_FILE = "audit.json"
CARD_FILE = "README.md"
_CARD_BYTES = 1 << 24
_HEADING = "## Audit"


def audit_of(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What audit.json says, in the folder of a run or in the folder `audit` there.

    None where there is none, where it is not complete, or where it was finished before the run was.

    Args:
        facts: Of the run, as `read_run` gives them.

    Raises:
        UsageError: It is damaged.
    """
    path = next((place for place in _places(Path(facts["folder"])) if is_file(place)), None)
    if path is None:
        return None
    found = parse_json(read_text(path), str(path))
    try:
        rows = [
            {
                "name": str(each["name"]),
                "verdict": str(each["verdict"]),
                "value": float(each["value"]),
                "low": float(each["interval"][0]),
                "high": float(each["interval"][1]),
                "limit": float(each["threshold"]),
                "unit": str(each["unit"]),
            }
            for each in found["findings"]
        ]
        told = {
            "verdict": found["verdict"],
            "short": bool(found.get("settings", {}).get("short")),
            "findings": rows,
            "notes": [str(note) for note in found["notes"]],
            "missing": {str(name): str(why) for name, why in found["missing"].items()},
            "finished": str(found["about"]["finished"]),
            "retain_only": found["about"].get("retain_only"),
        }
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} must be as `mollm audit` wrote it, but it is not: remove it, and audit again."
        ) from error
    finished = str(facts.get("finished") or "")
    if found["verdict"] is None or told["finished"] < finished:
        return None
    return told


def shown_verdict(verdict: str, *, short: bool) -> str:
    """A verdict that says so where it is that of a short audit.

    Example:
        >>> shown_verdict("PASS", short=True)
        'PASS (short)'
    """
    return f"{verdict} (short)" if short else verdict


def refuse_to_replace_full(out: Path, run: Mapping[str, Any] | None) -> None:
    """Refuses a folder where a short audit would take the place of a full one.

    Args:
        out: Where the short audit goes.
        run: The facts of the run that made the model, of whose audits one is shown.

    Raises:
        UsageError: It would.
    """
    places: tuple[Path, ...] = (out / AUDIT_FILE,)
    if run is not None and is_shown(out, run):
        places = _places(Path(run["folder"]))
    for path in places:
        if not is_file(path):
            continue
        found = parse_json(read_text(path), str(path))
        known = found if isinstance(found, Mapping) else {}
        settings = known.get("settings")
        short = isinstance(settings, Mapping) and settings.get("short") is True
        if known.get("verdict") is not None and not short:
            raise UsageError(
                f"out must be a folder without a full audit beside --short, but {path} is one: "
                "choose another folder with --out."
            )


def is_shown(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether report and cards of a run show the audit in `out`."""
    return (out / AUDIT_FILE).resolve() in [p.resolve() for p in _places(Path(run["folder"]))]


def _places(folder: Path) -> tuple[Path, Path]:
    """Where the audit of a run may be, the first one first."""
    return folder / AUDIT / AUDIT_FILE, folder / AUDIT_FILE


def with_audit(card: str, audit: Mapping[str, Any] | None) -> str:
    """A model card with the verdict of an audit, in place of one that it had."""
    kept = re.sub(rf"^{_HEADING}\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    if audit is None:
        return kept
    rows = [
        f"| {as_text(each['name'])} | {as_text(each['verdict'])} | {each['value']:.1%} | "
        f"{each['low']:.1%} to {each['high']:.1%} | {each['limit']:.1%} |"
        for each in audit["findings"]
    ]
    shown = shown_verdict(audit["verdict"], short=audit["short"])
    part = "\n".join(
        [
            _HEADING,
            "",
            f"Verdict: **{as_text(shown)}**. What attacks brought back of what the "
            "original knows, with 95 % intervals.",
            "",
            "| attack | verdict | brought back | interval | passes to |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            *(f"{as_text(note)}\n" for note in audit["notes"]),
        ]
    )
    head, heading, rest = kept.partition("\n## Data\n")
    return f"{head}\n{part}{heading}{rest}" if heading else f"{kept.rstrip()}\n\n{part}"


def write_audited_cards(facts: Mapping[str, Any]) -> None:
    """Puts the verdict into the cards that a run left: its own, and that of its model."""
    audit, root = audit_of(facts), Path(facts["folder"])
    for path in (root / CARD_FILE, root / "model" / CARD_FILE):
        if is_file(path):
            card = with_audit(read_text(path, _CARD_BYTES), audit)
            replace_text(path, card, follow_link=False)
