"""`mollm curve`: a suite's figures after each of several runs, as MUSE asks for them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mollm.commands import evaluate, unlearn
from mollm.commands.arguments import EXIT_FAILED, chat_words, data_of, device_of
from mollm.commands.evaluation_options import SAFETY, TOFU
from mollm.commands.series import call, hash_of_data, shared_settings
from mollm.errors import UsageError
from mollm.system.folders import locked, replace_text
from mollm.system.parsing import is_file, user_path
from mollm.system.tables import aligned

SUSTAINABILITY, SCALABILITY = "sustainability", "scalability"
CURVE_FILE, PAGE_FILE = "curve.json", "curve.html"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "curve",
        help="measure a suite after each of several runs: sustainability or scalability",
        description=(
            "Unlearns several sets and measures a suite before and after each run: for "
            "sustainability each run starts from the model of the one before, for scalability "
            "from the original, with sets of growing size. Writes curve.json and curve.html; the "
            "same command goes on where it was stopped."
        ),
    )
    parser.add_argument(
        "kind",
        choices=(SUSTAINABILITY, SCALABILITY),
        help="one request after another, or sets of growing size from the same model",
    )
    parser.add_argument(
        "--config", type=user_path, metavar="RUN.yaml", help="settings of every run"
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_HUB_NAME", help="what the first run starts from"
    )
    parser.add_argument("--retain", metavar="PATH_OR_HUB_NAME", help="what every run retains")
    parser.add_argument(
        "--forget",
        required=True,
        action="append",
        metavar="PATH_OR_HUB_NAME",
        help="what a run forgets; once for each run, in their order",
    )
    parser.add_argument(
        "--suite", required=True, metavar="NAME", help="as for `mollm evaluate`; so are the next"
    )
    parser.add_argument("--data", metavar="FOLDER_OR_HUB_NAME", help="the suite's data")
    parser.add_argument("--metrics", metavar="NAME,...", help="of the suite (default: all)")
    parser.add_argument("--retain-logs", metavar="PATH", help="of a retain-only model")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each set")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per batch")
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("runs/curve"),
        metavar="FOLDER",
        help="folder of the runs and the curve (default: runs/curve)",
    )
    parser.add_argument("--device", help="a Torch device")
    parser.set_defaults(run=_curve)


def _curve(arguments: argparse.Namespace) -> int:
    if arguments.suite == SAFETY:
        raise UsageError(
            f"suite must be one that needs no judge for a curve, but got {SAFETY!r}: choose "
            f"another one, or evaluate each run by `mollm evaluate --suite {SAFETY} --judge …`."
        )
    settings = _settings(arguments)
    device_of(arguments.device)  # refuses what there is not
    out: Path = arguments.out
    sets = [unlearn.resolved(data_of(text)) for text in arguments.forget]
    about = {
        "kind": arguments.kind,
        "suite": arguments.suite,
        **{name: getattr(arguments, name) for name in ("data", "metrics", "retain_logs", "limit")},
        "settings": settings,
        "model": _about_model(settings["model"]),
        "retain": _about_retain(settings),
        "forget": [_about(one, "forget") for one in sets],
    }
    with locked(out):
        _refuse_another(out / CURVE_FILE, about)
        points: list[dict[str, Any]] = []
        model = settings["model"]
        for number, forget in enumerate([None, *sets]):
            folder = out / f"{number:03d}"
            if forget is not None:
                if not _trained(folder, {**settings, "model": model, "forget": forget}):
                    print(f"Run {folder.name} failed: see {folder / 'README.md'}")
                    return EXIT_FAILED
                if arguments.kind == SUSTAINABILITY:
                    model = str(folder / "model")
            point = {"run": folder.name, "forget": None if forget is None else number - 1}
            made = settings["model"] if forget is None else str(folder / "model")
            figures = _measured(made, folder / "suite", arguments, settings)
            points.append({**point, "figures": figures})
            _write(out, {**about, "points": points})
    print("\n".join(_table(points)))
    print(f"Curve: {out / CURVE_FILE}   Page: {out / PAGE_FILE}")
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of every run, but for what it forgets and where it goes."""
    read, kept = shared_settings(arguments, "a curve")
    stray = [name for name in ("forget", "eval_forget", "out") if read.get(name) is not None]
    if stray:
        print(f"Not used: {', '.join(stray)}, since each run of a curve has its own.")
    if arguments.device is not None:
        kept["device"] = arguments.device
    for name in ("model", "retain", "eval_retain"):
        if read.get(name) is not None:
            kept[name] = unlearn.resolved(read[name])
    return kept


def _about(data: Any, role: str) -> dict[str, Any]:
    """Where a set is, its rows and their hash; none of what each run makes itself."""
    from mollm.data.sets import AUTO

    if data == AUTO:
        return {"source": data}
    sha256, rows = hash_of_data(data, role)
    return {"source": data, "rows": rows, "sha256": sha256}


def _about_retain(settings: dict[str, Any]) -> dict[str, Any]:
    """That of each set that the runs retain or evaluate on."""
    from mollm.data.sets import named_sets, sets_to_evaluate

    sets = named_sets(settings["retain"], "retain")
    if "eval_retain" in settings:
        evaluated = sets_to_evaluate("retain", settings["eval_retain"])
        sets |= {f"eval {name}": data for name, data in evaluated.items()}
    return {name: _about(data, "retain") for name, data in sets.items()}


def _about_model(name: str) -> dict[str, Any]:
    """Where the model is, and the hash of its weights if they are on this machine."""
    from mollm.models.loading import find_model
    from mollm.report.ledger import hash_of_model

    source = find_model(name)
    if not source.is_local:
        return {"source": name}
    file = source.gguf_file
    sha256 = hash_of_model(Path(source.location), *([] if file is None else [file]))
    return {"source": name, "sha256": sha256}


def _refuse_another(path: Path, about: dict[str, Any]) -> None:
    """Refuses a folder with another curve."""
    if not is_file(path):
        return
    from mollm.report.written import CURVE, read_written

    known = read_written(path, CURVE, "mollm curve")
    for name, value in json.loads(json.dumps(about)).items():
        if known.get(name) != value:
            raise UsageError(
                f"{path} must be of the same {name}, but that is {value!r} now and was "
                f"{known.get(name)!r}: choose another folder with --out."
            )


def _trained(folder: Path, settings: dict[str, Any]) -> bool:
    """Makes the model of a run, unless it is there; whether there is one."""
    config = folder.with_suffix(".yaml")
    replace_text(config, json.dumps({**settings, "out": str(folder)}, indent=1) + "\n")
    if (folder / "model").is_dir():
        return True
    return call(unlearn, ["unlearn", "--config", str(config), "--resume"]) == 0


def _measured(
    model: str, folder: Path, arguments: argparse.Namespace, settings: dict[str, Any]
) -> dict[str, Any]:
    """The suite's figures of a model, measured unless they are there."""
    from mollm.evaluation.summary import METRICS_FILE
    from mollm.report.written import METRICS, read_written

    if not is_file(folder / METRICS_FILE):
        words = ["evaluate", "--model", model, "--original", "none", "--suite", arguments.suite]
        for name in ("data", "metrics", "retain_logs", "limit", "batch_size", "device"):
            value = getattr(arguments, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        if arguments.suite == TOFU:  # other suites fix their prompts
            words += chat_words(settings)
            words += ["--long-rows", settings["long_rows"]] if "long_rows" in settings else []
        call(evaluate, [*words, "--out", str(folder), "--quiet"])
    found = read_written(folder / METRICS_FILE, METRICS, "mollm evaluate")["metrics"]
    return {name: {n: one[n] for n in ("value", "low", "high")} for name, one in found.items()}


def _table(points: list[dict[str, Any]]) -> list[str]:
    names = list(points[0]["figures"])
    cells = [("run", *names)]
    for point in points:
        values = [point["figures"].get(name, {}).get("value") for name in names]
        shown = ["-" if value is None else f"{value:.4g}" for value in values]
        cells.append((point["run"], *shown))
    return aligned(cells)


def _write(out: Path, told: dict[str, Any]) -> None:
    """Writes curve.json, and curve.html where the package jinja2 is."""
    from importlib.util import find_spec

    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(out / CURVE_FILE, text + "\n")
    if find_spec("jinja2") is None:
        return
    from mollm.evaluation.reading import reading_of
    from mollm.report.charts import Series, line_chart
    from mollm.report.page import COLOURS, environment

    points = told["points"]
    names = list(points[0]["figures"])
    charts = {}
    for name in names:
        values = [point["figures"].get(name, {}).get("value") for point in points]
        charts[name] = line_chart(name, [Series(name, values, COLOURS[0])], least=0.0, first=0)
    page = environment().get_template("curve.html.jinja")
    replace_text(
        out / PAGE_FILE,
        page.render(
            curve=told, names=names, charts=charts, good={n: reading_of(n).good for n in names}
        ),
    )
