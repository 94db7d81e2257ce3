"""`mollm completion`: what a shell needs to complete commands, flags and their values."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "completion",
        help="print what a shell needs to complete commands and flags",
        description=(
            "Prints a script for a shell that completes commands, flags and files, such as: mollm "
            "completion bash > ~/.local/share/bash-completion/completions/mollm"
        ),
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(arguments.root, arguments.shell))
    return 0
