"""The folder of an evaluation: what is written there, what is said, and what stays as it was."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mollm.commands.arguments import device_of
from mollm.errors import UsageError
from mollm.system.folders import replace_text
from mollm.system.parsing import parse_json, read_text
from mollm.system.terminal import has_colour

if TYPE_CHECKING:
    import torch

    from mollm.evaluation.summary import Evaluation

BENCHMARKS_FILE = "benchmarks.json"
_ABOUT_FILE = "about.json"
_ABOUT_BYTES = 1 << 24
_OWN = ("run", "no_cache", "explain", "quiet", "json")


@dataclass(frozen=True)
class Place:
    """Where models compute, and where it is said what goes on."""

    device: torch.device
    dtype: torch.dtype
    quiet: bool
    to_stderr: bool

    def say(self, text: str) -> None:
        """A line about what is going on, which stays clear of a bar."""
        if self.quiet:
            return
        if self.to_stderr:
            print(text, file=sys.stderr)
        elif sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(text)
        else:
            print(text)


def place_of(arguments: argparse.Namespace) -> Place:
    """That which the command line asks for."""
    import torch

    return Place(
        device_of(arguments.device),
        getattr(torch, arguments.dtype),
        quiet=arguments.quiet,
        to_stderr=arguments.json,
    )


def default_out(run: Mapping[str, Any] | None) -> Path:
    """Where results go if nobody says: into the folder of the run."""
    from mollm.report.page import EVALUATION

    return Path("runs/evaluate") if run is None else Path(run["folder"]) / EVALUATION


@dataclass(frozen=True)
class Measured:
    """What an evaluation found: of the result and, if there is one, of the original."""

    result: Evaluation
    original: Evaluation | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    """How the model was asked, see `ChatFormat.identity`; empty where a benchmark fixes that."""


def keep_results(
    out: Path,
    given: Mapping[str, Any],
    arguments: argparse.Namespace,
    measure: Callable[[Place], Measured],
    *,
    run: Mapping[str, Any] | None = None,
    original: bool = False,
) -> None:
    """Measures, writes figures and about.json into a folder, prints them, adds them to a report.

    What is written takes the place of an earlier evaluation in `out` at the end, which leaves
    nothing behind; files of the user's stay.

    Args:
        out: The folder.
        given: The command's arguments by name.
        arguments: The same, with all defaults.
        measure: Gives the figures; called once the folder has been looked at.
        run: The run whose report gets the figures, if they go to its folder.
        original: Whether there will be figures of an original.

    Raises:
        UsageError: `out` cannot be written, or holds files of the user's where the original's
            figures are to go.
    """
    from mollm.evaluation.journal import remove_journals
    from mollm.evaluation.summary import remove_evaluation
    from mollm.report.page import ORIGINAL, read_steps
    from mollm.system.folders import staged

    place = place_of(arguments)
    if _in_report(run, out):
        read_steps(run["folder"])  # says now what the report could not be made of at the end
    if original:
        _check_original(out / ORIGINAL)
    with contextlib.ExitStack() as stages:
        folder = stages.enter_context(staged(out))
        before = stages.enter_context(staged(out / ORIGINAL)) if original else None
        found = measure(place)
        found.result.write(folder)
        if before is not None and found.original is not None:
            found.original.write(before)
        _write_about(folder, given, found.chat, place.device)
    remove_journals(out)
    (out / BENCHMARKS_FILE).unlink(missing_ok=True)
    if not original:
        remove_evaluation(out / ORIGINAL)
    _tell(found.result, found.original, out, arguments)
    _add_to_report(run, out)


def _check_original(folder: Path) -> None:
    """Refuses a folder of the user's where the original's figures are to go."""
    from mollm.evaluation.summary import METRICS_FILE
    from mollm.system.folders import UNFINISHED

    if not folder.is_dir() or (folder / METRICS_FILE).is_file():
        return
    if any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
        raise UsageError(
            f"out must be a folder whose {folder.name} holds figures alone, but {folder} holds "
            "other files: choose another folder with --out."
        )


def keep_logs(logs: Path | None, out: Path) -> None:
    """Refuses results that would take the place of what they are compared with or made of.

    Raises:
        UsageError: They would.
    """
    if logs is not None and out.resolve() in (logs.resolve(), logs.resolve().parent):
        raise UsageError(
            "out must be another folder than that of the replies or the retain logs, but got "
            f"{out} for both: choose another one with --out."
        )


def refuse_other_logs(logs: Path | None, chat: Mapping[str, Any]) -> None:
    """Refuses logs of a model that was asked in another way, as far as they say how.

    Raises:
        UsageError: It was.
    """
    from mollm.data.prompt_format import OPEN_UNLEARNING
    from mollm.evaluation.open_unlearning import eval_file

    if logs is None:
        return
    if eval_file(logs) is not None:
        form = chat.get("prompt_format")
        if (form.get("like") if isinstance(form, dict) else form) != OPEN_UNLEARNING:
            raise UsageError(
                f"prompt-format must be {OPEN_UNLEARNING} beside retain logs of {OPEN_UNLEARNING}, "
                f"but got {form!r}: add --prompt-format {OPEN_UNLEARNING}, or evaluate the "
                "retain-only model with mollm too."
            )
        return
    known = chat_of(logs)
    if known is None:
        return
    for name, value in chat.items():
        if known.get(name) != value:
            raise UsageError(
                f"the retain logs must be of the same {name}, but that is {value!r} now and was "
                f"{known.get(name)!r} for {logs}: evaluate both models alike."
            )


def refuse_other_suite(logs: Path, suite: str, limit: int | None) -> None:
    """Refuses logs of another suite or of other examples of it, as far as they say so.

    Raises:
        UsageError: They are.
    """
    about = _about_of(logs)
    if about is None or not isinstance(about.get("settings"), dict):
        return
    for name, value in (("suite", suite), ("limit", limit)):
        known = about["settings"].get(name)
        if known != value:
            raise UsageError(
                f"the retain logs must be of the same {name}, but that is {value!r} now and was "
                f"{known!r} for {logs}: evaluate both models alike."
            )


def chat_of(results: Path) -> dict[str, Any] | None:
    """How a model was asked, by what stands beside its results; None where that does not say."""
    try:
        return dict((_about_of(results) or {})["chat"])
    except (ValueError, TypeError, LookupError):
        return None


def _about_of(results: Path) -> dict[str, Any] | None:
    """What about.json beside results says; None where there is none that can be read."""
    try:
        path = (results if results.is_dir() else results.parent) / _ABOUT_FILE
        return dict(parse_json(read_text(path, _ABOUT_BYTES), str(path)))
    except (ValueError, TypeError):
        return None


def _write_about(
    folder: Path, given: Mapping[str, Any], chat: Mapping[str, Any], device: torch.device
) -> None:
    """Writes about.json: the settings and versions that figures were made with.

    Args:
        folder: Where.
        given: The command's arguments.
        chat: How the model was asked, see `ChatFormat.identity`.
        device: Where it computed.
    """
    from mollm.system import machine

    about = {
        "settings": {name: value for name, value in given.items() if name not in _OWN},
        "chat": dict(chat),
        "device": machine.device_name(device),
        "versions": machine.versions(*(["lm_eval"] if "benchmarks" in given else [])),
        "commit": machine.commit(),
    }
    text = json.dumps(about, indent=2, ensure_ascii=False, default=str)
    replace_text(folder / _ABOUT_FILE, text + "\n")


def _tell(
    result: Evaluation, original: Evaluation | None, out: Path, arguments: argparse.Namespace
) -> None:
    """Prints the figures, as a table or as JSON."""
    from mollm.evaluation.summary import METRICS_FILE

    if arguments.json:
        models = (
            {"result": result} if original is None else {"original": original, "result": result}
        )
        told = {
            name: {figure: asdict(e) for figure, e in found.estimates.items()}
            for name, found in models.items()
        }
        print(json.dumps({**told, "missing": dict(result.missing)}, indent=1, allow_nan=False))
        return
    print(result.table(original, explain=arguments.explain, colour=has_colour(sys.stdout)))
    print(f"Figures: {out / METRICS_FILE}   By question: examples.jsonl beside it")


def _add_to_report(run: Mapping[str, Any] | None, out: Path) -> None:
    """Adds the figures to the report of the run that they are in the folder of."""
    from mollm.report.page import REPORT_FILE, write_report

    if _in_report(run, out):
        folder = Path(run["folder"])
        write_report([folder], folder / REPORT_FILE)


def _in_report(run: Mapping[str, Any] | None, out: Path) -> TypeGuard[Mapping[str, Any]]:
    """Whether the figures go to the folder of the run whose report shows them."""
    from importlib.util import find_spec

    from mollm.report.page import EVALUATION

    if run is None or find_spec("jinja2") is None:
        return False
    return out.resolve() == (Path(run["folder"]) / EVALUATION).resolve()
