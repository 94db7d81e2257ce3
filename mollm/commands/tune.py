"""`mollm tune`: which learning rate, and how many steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import add_chat_options
from mollm.commands.settings_file import read_settings, require
from mollm.errors import UsageError
from mollm.system.parsing import user_path

if TYPE_CHECKING:
    from mollm.training.sweep import Sweep

_OWN = ("run", "minutes", "file", "json")
_STEPS = 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "tune",
        help="try learning rates and lengths for some minutes, and recommend one",
        description=(
            "Makes short runs at several learning rates and lengths, draws what they kept against "
            "what they had forgotten, and writes a settings file with the best. Takes the settings "
            "of `mollm unlearn`; learning_rate and max_steps are where it begins."
        ),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="settings file")
    for name, what in (
        ("model", "model to unlearn from: folder, .gguf file or hub name"),
        ("forget", "examples to forget"),
        ("retain", "examples to retain"),
        ("eval-forget", "forget examples to measure on (default: those to forget)"),
        ("eval-retain", "retain examples to measure on (default: a fifth of them, held out)"),
    ):
        parser.add_argument(f"--{name}", metavar="PATH_OR_HUB_NAME", help=what)
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="where to begin")
    parser.add_argument("--max-steps", type=int, metavar="N", help=f"of a run (default: {_STEPS})")
    add_chat_options(parser)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter")
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any other setting; several allowed"
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="N", help="the budget (default: 5)"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    parser.add_argument(
        "file", nargs="?", type=user_path, default=Path("tuned.yaml"), metavar="TUNED.yaml"
    )
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from mollm.system.folders import check_new_file
    from mollm.training.sweep import sweep

    given = vars(arguments)
    settings = read_settings({name: given[name] for name in given if name not in _OWN})
    require(settings)
    path: Path = arguments.file
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"the settings must go to a .yaml file, but got {path}.")
    check_new_file(path)
    check_new_file(path.with_suffix(".html"))
    out = sys.stderr if arguments.json else sys.stdout
    own, options = _parts(settings)
    found = sweep(
        settings["model"],
        {name: settings.get(name) for name in ("forget", "retain", "eval_forget", "eval_retain")},
        options,
        minutes=arguments.minutes,
        adapter=own,
        say=lambda text: print(text, file=out, flush=True),
    )
    best = found.best
    assert best is not None, "the first run ended"
    chosen = {**settings, "learning_rate": best.learning_rate, "max_steps": best.steps}
    _write(path, chosen, found)
    page = path.with_suffix(".html")
    _draw(page, str(settings["model"]), found)
    if arguments.json:
        told = {
            "learning_rate": best.learning_rate,
            "max_steps": best.steps,
            "points": [vars(point) | {"score": point.score} for point in found.points],
            "failed": dict(found.failed),
            "seconds": round(found.seconds, 1),
            "warning": found.warning,
            "settings": str(path),
            "page": str(page),
        }
        print(json.dumps(told, indent=1))
    else:
        print(
            f"Recommended: learning rate {best.learning_rate:.2g}, {best.steps} steps\n"
            f"Forgotten {best.forgotten:.1%}, kept {best.kept:.1%} of {found.held_out}"
        )
        if found.warning is not None:
            print(f"Mind: {found.warning}")
        print(f"Picture: {page}   Next: mollm unlearn --config {path}")
    return 0


def _parts(settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The adapter, and the fields of a MOLLMConfig."""
    from mollm.commands.settings_file import OWN_SETTINGS
    from mollm.commands.unlearn import make_adapter, make_arguments
    from mollm.models import loading
    from mollm.planning.first_settings import rate_for

    options = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    if settings.get("device") == "cpu":
        options["use_cpu"] = True
    adapter = make_adapter(settings.get("lora"))
    args = make_arguments(settings, Path("unused"))
    args.require_adapter_if_quantized(adapter)
    if args.chosen_method.finish is not None:
        raise UsageError(
            "method must be one whose runs can be measured on the way for mollm tune, but got "
            f"{args.method}, which turns the model around after the last step: set its "
            "learning_rate and max_steps by hand."
        )
    size = loading.count_parameters(loading.find_model(settings["model"]))
    options.setdefault("learning_rate", rate_for(size, adapter=adapter is not None))
    options.setdefault("max_steps", _STEPS)
    return adapter, options


def _write(path: Path, settings: Mapping[str, Any], found: Sweep) -> None:
    from mollm.system.folders import replace_text

    best = found.best
    assert best is not None, "the first run ended"
    lines = [
        "# Settings of a run: mollm unlearn --config THIS_FILE",
        f"# learning_rate and max_steps by mollm tune: forgotten {best.forgotten:.1%}, kept "
        f"{best.kept:.1%} of {found.held_out}.",
        *([] if found.warning is None else [f"# Mind: {found.warning}"]),
        *(f"{name}: {_yaml(value)}" for name, value in settings.items() if value is not None),
    ]
    replace_text(path, "\n".join(lines) + "\n")


def _yaml(value: Any) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _draw(path: Path, model: str, found: Sweep) -> None:
    from mollm.report.charts import Dot, scatter_chart
    from mollm.report.page import COLOURS, environment
    from mollm.system.folders import replace_text

    ends = [point for point in found.points if point.is_end]
    rates = sorted({end.learning_rate for end in ends})
    colours = {rate: COLOURS[i % len(COLOURS)] for i, rate in enumerate(rates)}
    dots = {
        point: Dot(
            point.forgotten,
            point.kept,
            colours[point.learning_rate],
            f"{point.learning_rate:.2g}, step {point.step} of {point.steps}: forgotten "
            f"{point.forgotten:.1%}, kept {point.kept:.1%}",
            point == found.best,
        )
        for point in found.points
    }
    chart = scatter_chart(
        "Kept against forgotten of each run", list(dots.values()), [dots[p] for p in found.front]
    )
    template = environment().get_template("tune.html.jinja")
    page = template.render(
        model=model,
        sweep=found,
        best=found.best,
        ends=sorted(ends, key=lambda end: -end.score),
        chart=chart,
        rates=[f"{rate:.2g}" for rate in rates],
        colours=[colours[rate] for rate in rates],
    )
    replace_text(path, page)
