"""A ledger of requests to delete: ledger.json, its page, and a manifest for each request.

A request is a set to forget, known by a hash of what its rows say. The ledger holds no row of it,
so that it may be kept when the data have been deleted. A manifest binds a request's data, settings,
models and figures by their hashes, and says what makes it void.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.report.page import environment
from mollm.report.written import LEDGER, NUMBER, REQUEST, fault_in
from mollm.system.folders import replace_text
from mollm.system.parsing import is_file, parse_json, read_text

LEDGER_FILE, PAGE_FILE, MANIFEST_FILE = "ledger.json", "ledger.html", "manifest.json"
FORMAT = 1
OPEN, TRAINED, DONE = "open", "trained", "done"
FAILED, DROPPED = "failed", "dropped"
FIGURES = ("forget_probability", "forget_rouge_l")
"""What every request is tested by."""
_STATES = (OPEN, TRAINED, DONE, FAILED, DROPPED)
_RUN = (TRAINED, DONE)
_BLOCK = 1 << 20
_LEDGER_BYTES = 1 << 24


@dataclass
class Request:
    """A request to delete, and what became of it."""

    number: int
    forget: Any
    """A path, a name on the hub, or options of `mollm.data.load_records` with a path."""
    sha256: str
    """Of what the rows say, see `mollm.data.records.content_hash`."""
    rows: int
    added: str
    note: str = ""
    status: str = OPEN
    """TRAINED where there is a model, and tests and audit are not through yet."""
    run: str | None = None
    """The folder of its run, in that of the ledger."""
    before: str | None = None
    """The model that its run started from."""
    weights_sha256: str | None = None
    """Of the model that its run made, see `hash_of_model`."""
    verdict: str | None = None
    """Of the audit; None where there was none."""
    manifest_sha256: str | None = None
    reason: str | None = None
    """Why it failed or was dropped, or why there is no verdict."""
    dropped: str | None = None
    """When it was taken out before its run."""
    tests: list[dict[str, Any]] = field(default_factory=list)
    """What each run since measured of it: `run`, `figures` by name, or `skipped` with a reason."""

    @property
    def name(self) -> str:
        """Of its run's folder: 001 for the first."""
        return f"{self.number:03d}"


_FIELDS = {f.name for f in fields(Request)}
_DEFAULTS = {f.name: f.default for f in fields(Request) if f.default is not MISSING}


@dataclass
class Ledger:
    """All requests to one model, in the order of their arrival."""

    folder: Path
    model: str
    """What the first run starts from."""
    retain: Any
    """What every run retains."""
    settings: dict[str, Any]
    """Of every run, by name: fields of a MOLLMConfig, and lora and device."""
    requests: list[Request] = field(default_factory=list)

    @property
    def last_model(self) -> str:
        """What the next run starts from: the model of the last request that is done."""
        done = [request for request in self.requests if request.status == DONE]
        return str(self.folder / f"{done[-1].run}" / "model") if done else self.model

    def write(self) -> None:
        """Writes ledger.json, and ledger.html where the package jinja2 is."""
        from importlib.util import find_spec

        told = {
            "format": FORMAT,
            "model": self.model,
            "retain": self.retain,
            "settings": self.settings,
            "requests": [asdict(request) for request in self.requests],
        }
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)
        replace_text(self.folder / LEDGER_FILE, text + "\n")
        if find_spec("jinja2") is not None:
            page = environment().get_template("ledger.html.jinja").render(ledger=self)
            replace_text(self.folder / PAGE_FILE, page)


def read_ledger(folder: Path) -> Ledger:
    """What `Ledger.write` wrote.

    Raises:
        UsageError: There is none, or it is damaged or of a later release.
    """
    path = folder / LEDGER_FILE
    if not is_file(path):
        raise UsageError(
            f"ledger must be a folder with a {LEDGER_FILE}, but {folder} has none: begin one with "
            "mollm request add --model MODEL --retain RETAIN --forget FORGET."
        )
    told = parse_json(read_text(path, _LEDGER_BYTES), str(path))
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise UsageError(
            f"{path} must be of format {FORMAT}, but it is not: take it from a backup."
        )
    fault = fault_in(told, LEDGER)
    requests = []
    for number, request in enumerate([] if fault else told["requests"], 1):
        request = {"tests": [], **_DEFAULTS, **request}  # one of before there were such fields
        if fault_in(request, REQUEST) is not None or not _is_whole(request, number):
            fault = f"requests[{number - 1}]"
            break
        requests.append(Request(**request))
    if fault is not None:
        raise UsageError(
            f"{path} must be a ledger of `mollm request`, but its {fault or 'whole'} is damaged: "
            "take it from a backup."
        )
    return Ledger(folder, told["model"], told["retain"], told["settings"], requests)


def _is_whole(request: Mapping[str, Any], number: int) -> bool:
    """Whether a request of the right kinds is one that could have been written there."""
    name = f"{number:03d}"
    if set(request) != _FIELDS or request["number"] != number or request["status"] not in _STATES:
        return False
    if request["run"] not in (None, name) or (request["status"] in _RUN and not request["run"]):
        return False
    figures = {"figures": dict.fromkeys(FIGURES, NUMBER)}
    return all(
        isinstance(test.get("skipped"), str) or fault_in(test, figures) is None
        for test in request["tests"]
    )


def hash_of_model(folder: Path, names: str = "*.safetensors") -> str:
    """SHA-256 of a model's weights: of its files of these names, in their order.

    Raises:
        UsageError: There is none.
    """
    files = sorted(folder.glob(names))
    if not files:
        raise UsageError(
            f"a model must be a folder with {names} in it, but {folder} has none: has it been "
            "moved?"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> str:
    """Writes manifest.json of a request into the folder of its run; returns the file's SHA-256.

    Args:
        folder: Of the run.
        facts: Data, settings, models and figures of the request.
    """
    told = {
        **facts,
        "void_if": [
            "the model's weights have another hash than weights_sha256",
            "this file has another hash than the ledger holds as manifest_sha256",
            "the data to forget or to retain have other hashes than those under data, where they "
            "still exist",
            "the model is trained, merged or quantised after its run",
        ],
    }
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_text(folder / MANIFEST_FILE, text)
    return hashlib.sha256(text.encode()).hexdigest()


def void_because(ledger: Ledger, request: Request) -> str | None:
    """Why the manifest of a request that is done holds no more; None where it holds.

    Reads all of the model's weights. Data are for the caller to compare, who can read them.
    """
    run = ledger.folder / str(request.run)
    manifest = run / MANIFEST_FILE
    if not manifest.is_file():
        return f"its {MANIFEST_FILE} is gone"
    if hashlib.sha256(manifest.read_bytes()).hexdigest() != request.manifest_sha256:
        return f"its {MANIFEST_FILE} has been changed"
    try:
        found = hash_of_model(run / "model")
    except UsageError:
        return "its model is gone"
    if found != request.weights_sha256:
        return "the weights of its model have been changed"
    return None
