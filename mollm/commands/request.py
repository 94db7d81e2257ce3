"""`mollm request`: requests to delete over time, each with its run, tests and audit."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands import audit, evaluate, unlearn
from mollm.commands.arguments import EXIT_FAILED, data_of, device_of
from mollm.commands.series import call, hash_of_data, shared_settings
from mollm.errors import UsageError
from mollm.system.folders import locked, replace_text
from mollm.system.parsing import user_path
from mollm.system.tables import aligned

if TYPE_CHECKING:
    from mollm.report.ledger import Ledger, Request

_FEWEST_ROWS = 2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "request",
        help="keep a ledger of requests to delete",
        description=(
            "Keeps a ledger of requests to delete: each is a set to forget with its hash. A run "
            "starts from the model of the last one, tests every earlier request again, audits the "
            "new one, and leaves a manifest that binds data, settings, weights and figures."
        ),
    )
    steps = parser.add_subparsers(title="steps", required=True, metavar="STEP")
    add = steps.add_parser(
        "add", help="add a request; the first one names model, retain data and settings"
    )
    add.add_argument("--forget", required=True, metavar="PATH_OR_HUB_NAME", help="what to delete")
    add.add_argument("--note", default="", metavar="TEXT", help="who asked, or a case number")
    add.add_argument("--model", metavar="PATH_OR_HUB_NAME", help="what the first run starts from")
    add.add_argument("--retain", metavar="PATH_OR_HUB_NAME", help="what every run retains")
    add.add_argument(
        "--config", type=user_path, metavar="RUN.yaml", help="settings of every run of this ledger"
    )
    add.set_defaults(run=_add)
    run = steps.add_parser("run", help="run what is open, one request after the other")
    run.add_argument(
        "--audit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="audit each new model with regard to its request (default: yes)",
    )
    run.add_argument("--batch-size", type=int, default=8, help="examples per batch of the tests")
    run.add_argument("--device", help="a Torch device")
    run.set_defaults(run=_run)
    drop = steps.add_parser(
        "drop", help="take out a request that has not been run; the ledger keeps it, and why"
    )
    drop.add_argument("request", metavar="NUMBER", help="of the request, such as 2 or 002")
    drop.add_argument("--reason", required=True, metavar="TEXT", help="why it is taken out")
    drop.set_defaults(run=_drop)
    status = steps.add_parser("status", help="list the requests, and say whose manifest is void")
    status.add_argument("--json", action="store_true", help="print the requests as JSON")
    status.set_defaults(run=_status)
    for step in (add, run, drop, status):
        step.add_argument(
            "--ledger",
            type=user_path,
            default=Path("requests"),
            metavar="FOLDER",
            help="folder of the ledger",
        )


def _add(arguments: argparse.Namespace) -> int:
    from mollm.evaluation.suite import load_suite
    from mollm.report.ledger import DROPPED, FAILED, LEDGER_FILE, Ledger, Request, read_ledger

    folder: Path = arguments.ledger
    with locked(folder, flag="ledger"):
        if (folder / LEDGER_FILE).is_file():
            ledger = read_ledger(folder)
            for name in ("model", "retain", "config"):
                if getattr(arguments, name) is not None:
                    raise UsageError(
                        f"{name} must be left out once a ledger is begun, for every run goes on "
                        f"from the last one, but got {getattr(arguments, name)}."
                    )
        else:
            ledger = Ledger(folder, *_first(arguments))
        forget = _by_place(data_of(arguments.forget), "forget")
        sha256, rows = hash_of_data(forget, "forget")
        for known in ledger.requests:
            if known.sha256 == sha256 and known.status not in (FAILED, DROPPED):
                raise UsageError(
                    f"a request must be for other rows than the ones before, but {known.name} is "
                    "for the same."
                )
        if rows < _FEWEST_ROWS:
            raise UsageError(
                f"a request must have at least {_FEWEST_ROWS} rows to be tested, but got {rows}: "
                "add it together with another one, in one file."
            )
        load_suite(forget)  # refuses now what could not be tested after the run
        request = Request(len(ledger.requests) + 1, forget, sha256, rows, _now(), arguments.note)
        ledger.requests.append(request)
        ledger.write()
    print(f"Request {request.name}: {rows} rows, SHA-256 {sha256}")
    print(f"Next: mollm request run --ledger {folder}")
    return 0


def _first(arguments: argparse.Namespace) -> tuple[str, Any, dict[str, Any]]:
    """Model, retain data and settings of a new ledger."""
    settings, kept = shared_settings(arguments, "the first request of a ledger")
    if settings.get("eval_forget") is not None:
        raise UsageError(
            "eval_forget must be left out of the settings of a ledger, since each request is "
            "tested on rows of its own, but it is there: remove it."
        )
    if settings.get("out") is not None:
        print(f"Not used: out, {settings['out']}. The runs go to folders in {arguments.ledger}.")
    if settings.get("eval_retain") is not None:
        kept["eval_retain"] = _by_place(settings["eval_retain"], "eval_retain")
    return unlearn.resolved(settings["model"]), _by_place(settings["retain"], "retain"), kept


def _run(arguments: argparse.Namespace) -> int:
    from mollm.report.ledger import OPEN, TRAINED, read_ledger

    if arguments.batch_size < 1:
        raise UsageError(f"batch-size must be at least 1, but got {arguments.batch_size}.")
    device_of(arguments.device)  # refuses what there is not
    folder: Path = arguments.ledger
    with locked(folder, flag="ledger") if folder.is_dir() else _nothing(folder):
        ledger = read_ledger(folder)
        waiting = [request for request in ledger.requests if request.status in (OPEN, TRAINED)]
        if not waiting:
            print("Nothing is open.")
            return 0
        for request in waiting:
            if not _run_one(ledger, request, arguments):
                print(f"Request {request.name} failed: {request.reason}")
                return EXIT_FAILED
            print(f"Request {request.name} is done: {folder / str(request.run)}")
            if request.reason is not None:
                print(f"Request {request.name}: {request.reason}")
    return 0


def _nothing(folder: Path) -> Any:
    raise UsageError(
        f"ledger must be a folder that `mollm request add` made, but there is no {folder}."
    )


def _run_one(ledger: Ledger, request: Request, arguments: argparse.Namespace) -> bool:
    """Unlearns, tests again and audits; the ledger is written after each of the three."""
    from mollm.report.ledger import DONE, OPEN, write_manifest
    from mollm.report.run_file import RUN_FILE
    from mollm.report.written import RUN, read_written

    if request.status == OPEN and not _train(ledger, request):
        return False
    run = ledger.folder / str(request.run)
    _test_all(ledger, request, arguments)
    if arguments.audit:
        request.verdict, request.reason = _audited(ledger, request, arguments)
    facts = read_written(run / RUN_FILE, RUN, "mollm unlearn")
    request.manifest_sha256 = write_manifest(
        run,
        {
            "request": request.number,
            "data": {
                "forget": {"sha256": request.sha256, "rows": request.rows},
                "retain": {n: d["sha256"] for n, d in facts["data"].items() if "retain" in n},
            },
            "settings": facts["settings"],
            "settings_sha256": _sha256(facts["settings"]),
            "versions": facts["versions"],
            "before_sha256": _hash_or_none(Path(str(request.before))),
            "weights_sha256": request.weights_sha256,
            "figures": {
                other.name: next((t for t in reversed(other.tests) if t["run"] == request.run), {})
                for other in ledger.requests
                if other.tests
            },
            "verdict": request.verdict,
            "made": _now(),
        },
    )
    request.status = DONE
    ledger.write()
    return True


def _train(ledger: Ledger, request: Request) -> bool:
    """Makes the model of a request, unless it is there; whether there is one."""
    from mollm.report.ledger import FAILED, TRAINED, hash_of_model

    _check_data(request)
    request.run, request.before = request.name, ledger.last_model
    run = ledger.folder / request.run
    config = ledger.folder / f"{request.name}.yaml"
    settings = {
        **ledger.settings,
        "model": request.before,
        "forget": request.forget,
        "retain": ledger.retain,
        "out": str(run),
    }
    replace_text(config, json.dumps(settings, indent=1) + "\n")
    # Of a run that was interrupted the checkpoints are there; of one that was not, nothing is. One
    # that was killed between its model and the ledger has finished, and is not to be resumed.
    words = ["unlearn", "--config", str(config), "--resume"]
    if not (run / "model").is_dir() and call(unlearn, words) != 0:
        request.status, request.reason = FAILED, f"see {run / 'README.md'}"
        ledger.write()
        return False
    request.status, request.weights_sha256 = TRAINED, hash_of_model(run / "model")
    ledger.write()
    return True


def _test_all(ledger: Ledger, new: Request, arguments: argparse.Namespace) -> None:
    """Measures the new model on the rows of every request so far that did not fail."""
    from mollm.evaluation.summary import METRICS_FILE
    from mollm.report.ledger import FAILED, FIGURES
    from mollm.report.written import METRICS, read_written

    run = ledger.folder / str(new.run)
    for request in ledger.requests:
        if request.run is None or request.status == FAILED:
            continue
        request.tests = [test for test in request.tests if test["run"] != new.run]
        out = run / "tests" / request.name
        words = ["evaluate", "--model", str(run / "model"), "--original", "none"]
        words += ["--forget", _as_word(request.forget), "--metrics", ",".join(FIGURES)]
        words += ["--out", str(out), "--quiet", *_common(arguments)]
        try:
            _check_data(request)
            call(evaluate, words)
        except UsageError as error:
            print(f"Request {request.name} was not tested: {error}")
            request.tests.append({"run": new.run, "skipped": str(error)})
            continue
        found = read_written(out / METRICS_FILE, METRICS, "mollm evaluate")["metrics"]
        figures = {name: found[name]["value"] for name in FIGURES}
        request.tests.append({"run": new.run, "figures": figures})
    ledger.write()


def _audited(
    ledger: Ledger, request: Request, arguments: argparse.Namespace
) -> tuple[str, None] | tuple[None, str]:
    """The verdict, or why there is none: of fewer than four rows, for one."""
    from mollm.report.run_file import read_run
    from mollm.report.written import read_written

    run = ledger.folder / str(request.run)
    words = ["audit", "--model", str(run / "model"), "--original", str(request.before)]
    # Of data that the model made for its run, the run knows where they are.
    facts = read_run(run)
    words += ["--forget", _as_word(request.forget), "--retain", _retained_by(facts)]
    words += ["--out", str(run / "audit"), *_common(arguments)]
    try:
        _check_data(request)
        call(audit, words)
    except UsageError as error:
        return None, f"not audited: {error}"
    found = read_written(run / "audit" / "audit.json", {"verdict": str}, "mollm audit")
    return str(found["verdict"]), None


def _drop(arguments: argparse.Namespace) -> int:
    from mollm.report.ledger import DROPPED, OPEN, read_ledger

    folder: Path = arguments.ledger
    reason = arguments.reason.strip()
    if not reason:
        raise UsageError("reason must say why the request is taken out, but it is empty.")
    with locked(folder, flag="ledger") if folder.is_dir() else _nothing(folder):
        ledger = read_ledger(folder)
        request = _numbered(ledger, arguments.request)
        if request.status != OPEN:
            raise UsageError(
                f"request {request.name} must be open to be taken out, but it is {request.status}: "
                "what was run stays in the ledger."
            )
        request.status, request.reason, request.dropped = DROPPED, reason, _now()
        ledger.write()
    print(f"Request {request.name} is dropped, and stays in the ledger with its reason.")
    begun = folder / request.name
    if begun.exists():
        print(f"Its run was begun, and may hold rows: delete {begun}")
    return 0


def _numbered(ledger: Ledger, number: str) -> Request:
    """The request of that number.

    Raises:
        UsageError: There is none.
    """
    found = [one for one in ledger.requests if number.isdecimal() and one.number == int(number)]
    if not found:
        raise UsageError(
            f"a request must be one of {', '.join(one.name for one in ledger.requests)}, but got "
            f"{number!r}: `mollm request status` lists them."
        )
    return found[0]


def _status(arguments: argparse.Namespace) -> int:
    from mollm.report.ledger import DONE, PAGE_FILE, read_ledger, void_because

    ledger = read_ledger(arguments.ledger)
    done = [request for request in ledger.requests if request.status == DONE]
    retained = _retained(ledger) if done else {}
    void = {
        request.name: void_because(ledger, request) or _changed(ledger, request, retained)
        for request in done
    }
    if arguments.json:
        told = [
            {**vars(request), "void_because": void.get(request.name)} for request in ledger.requests
        ]
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        cells = [("request", "rows", "state", "likelihood", "audit", "manifest")]
        for request in ledger.requests:
            figures = request.tests[-1].get("figures") if request.tests else None
            last = f"{figures['forget_probability']:.4f}" if figures else "-"
            reason = void.get(request.name, "-")
            manifest = "holds" if reason is None else "-" if reason == "-" else f"void: {reason}"
            cells.append(
                (
                    request.name,
                    str(request.rows),
                    request.status,
                    last,
                    request.verdict or "-",
                    manifest,
                )
            )
        print("\n".join(aligned(cells)))
        for request in ledger.requests:
            if request.reason is not None:
                print(f"{request.name}: {request.reason}")
        print(f"Page: {ledger.folder / PAGE_FILE}")
    return EXIT_FAILED if any(void.values()) else 0


def _changed(ledger: Ledger, request: Request, retained: Mapping[str, str]) -> str | None:
    """Whether the data that still exist are other ones; to be gone is what was asked for."""
    from mollm.report.ledger import MANIFEST_FILE
    from mollm.report.written import MANIFEST, read_written

    path = ledger.folder / str(request.run) / MANIFEST_FILE
    before = read_written(path, MANIFEST, "mollm request")["data"]["retain"]
    retained = {**retained, **_made(ledger, request)}
    if any(retained.get(name, sha256) != sha256 for name, sha256 in before.items()):
        return "the data to retain have been changed"
    with contextlib.suppress(UsageError):
        if hash_of_data(request.forget, "forget")[0] != request.sha256:
            return "its data have been changed"
    return None


def _retained(ledger: Ledger) -> dict[str, str]:
    """The hashes of the sets to retain that still exist, by their names in a run."""
    from mollm.data.sets import named_sets, sets_to_evaluate

    sets = named_sets(ledger.retain, "retain")
    if "eval_retain" in ledger.settings:
        evaluated = sets_to_evaluate("retain", ledger.settings["eval_retain"])
        sets |= {f"eval {name}": data for name, data in evaluated.items()}
    found = {}
    for name, data in sets.items():
        with contextlib.suppress(UsageError):
            found[name], _ = hash_of_data(data, "retain")
    return found


def _made(ledger: Ledger, request: Request) -> dict[str, str]:
    """The hashes of the sets to retain that the model made for a run, by their names in it.

    Of one that is there but cannot be read, it is that of nothing.
    """
    from mollm.data.sets import AUTO, named_sets
    from mollm.report.run_file import read_run

    asked = [name for name, data in named_sets(ledger.retain, "retain").items() if data == AUTO]
    if not asked:
        return {}
    run = ledger.folder / str(request.run)
    facts = read_run(run)
    given = named_sets(data_of(_retained_by(facts)), "retain")
    found = {}
    for name in asked:
        path = run / Path(str(given[name])).name  # the ledger may have moved since
        if path.exists():
            try:
                found[name], _ = hash_of_data(str(path), "retain")
            except UsageError:
                found[name] = ""
    return found


def _retained_by(facts: Mapping[str, Any]) -> str:
    """What a run retained, by its run.json."""
    found: str | None = facts.get("given", {}).get("retain")
    if found is None:
        raise UsageError(
            f"{facts['folder']} must be a run that `mollm request` made, but its run.json does not "
            "say what it retained."
        )
    return found


def _check_data(request: Request) -> None:
    sha256, _ = hash_of_data(request.forget, "forget")
    if sha256 != request.sha256:
        raise UsageError(
            f"the data of request {request.name} must be what they were when it was added, but "
            f"have another hash now: put them back, or take the request out with `mollm request "
            f"drop {request.number} --reason TEXT`, and add a new one."
        )


def _hash_or_none(model: Path) -> str | None:
    from mollm.report.ledger import hash_of_model

    try:
        return hash_of_model(model)
    except UsageError:
        return None


def _common(arguments: argparse.Namespace) -> list[str]:
    device = [] if arguments.device is None else ["--device", arguments.device]
    return ["--batch-size", str(arguments.batch_size), *device]


def _by_place(data: Any, name: str) -> Any:
    """Data by where they are, so that the ledger may be used from any folder.

    Raises:
        UsageError: They are rows, which a ledger is not to hold.
    """
    sets = data.values() if isinstance(data, Mapping) else [data]
    if any(isinstance(one, list) for one in sets):
        raise UsageError(
            f"{name} must be a path or a name, since a ledger holds no rows, but got rows: write "
            "them to a file."
        )
    return unlearn.resolved(data)


def _as_word(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
