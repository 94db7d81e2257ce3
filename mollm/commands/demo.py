"""`mollm demo`: a chat model forgets some capitals."""

from __future__ import annotations

import argparse
import json
import sys

from mollm.commands.arguments import EXIT_FAILED, add_renamed
from mollm.demo.settings import DemoSettings
from mollm.system.options import add_options


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
    add_options(parser, DemoSettings)
    add_renamed(parser, "--direction", "--method")
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
    from mollm.training.history import nan_to_none

    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "json")}
    settings = DemoSettings(**given)
    if "json" in arguments:
        run = run_demo(settings, say=lambda text: print(text, file=sys.stderr))
        print(json.dumps(nan_to_none(run.summary), indent=1, ensure_ascii=False))
    else:
        run = run_demo(settings)
        print(table(run))
        print(f"Report: {arguments.out / 'report.html'}   Model: {arguments.out / 'model'}")
    return 0 if run.summary["failure"] is None else EXIT_FAILED
