"""`mollm report`: the page of a run, or of several beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mollm.errors import UsageError
from mollm.system.parsing import user_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "report",
        help="write the page of a run, or compare several",
        description=(
            "Writes the page of a run anew, as after an evaluation, or one that compares several "
            "runs: what differs, metrics, and curves."
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that `mollm unlearn` wrote")
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FILE.html",
        help="where to write it (default: report.html of the run; of several, comparison.html in "
        "the folder that the first one is in)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what the pages say as JSON, and write a page only with --out",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from mollm.report.page import REPORT_FILE, as_dict, read_reported, render
    from mollm.system.folders import check_new_file, replace_text

    runs = [read_reported(folder) for folder in arguments.runs]
    if arguments.json:
        print(json.dumps({"runs": [as_dict(run) for run in runs]}, indent=1, ensure_ascii=False))
        if arguments.out is None:
            return 0
    one = runs[0].folder
    path: Path = arguments.out or (
        one / REPORT_FILE if len(runs) == 1 else one.parent / "comparison.html"
    )
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"out must be an .html file, but got {path}.")
    check_new_file(path)
    replace_text(path, render(runs))
    print(f"Report: {path}", file=sys.stderr if arguments.json else sys.stdout)
    return 0
