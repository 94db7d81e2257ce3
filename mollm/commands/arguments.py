"""What the commands' arguments share."""

from __future__ import annotations

import argparse
from typing import Any


class _Renamed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is now {self.const}")


def add_renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Has the parser refuse the flag `old`, with the name that it has now."""
    parser.add_argument(
        old,
        action=_Renamed,
        const=new,
        nargs="?",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
