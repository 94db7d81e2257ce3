"""What commands share that make several runs, one after the other, from the same settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mollm.commands.settings_file import OWN_SETTINGS, read_settings
from mollm.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType


def call(command: ModuleType, words: list[str]) -> int:
    """The exit status of a command of `mollm` with these words, its own name the first of them."""
    parser = argparse.ArgumentParser(prog="mollm")
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments))


def shared_settings(
    arguments: argparse.Namespace, purpose: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings of --config, --model and --retain; and those that each run takes over as they
    are.

    Args:
        arguments: With `config`, `model` and `retain`.
        purpose: What model and retain data must be given for, such as "a curve".

    Raises:
        UsageError: The file cannot be read, or names no model or no retain data.
    """
    given = {
        name: getattr(arguments, name)
        for name in ("config", "model", "retain")
        if getattr(arguments, name)
    }
    settings = read_settings(given)
    for name in ("model", "retain"):
        if not settings.get(name):
            raise UsageError(
                f"{name} must be given for {purpose}, but it is not: add it to the settings file, "
                f"or --{name}."
            )
    kept = {
        name: value
        for name, value in settings.items()
        if name not in OWN_SETTINGS or name in ("lora", "device")
    }
    return settings, kept


def hash_of_data(data: Any, role: Any) -> tuple[str, int]:
    """The hash of a set and how many rows it has.

    Raises:
        UsageError: It cannot be read.
    """
    from mollm.data.records import content_hash
    from mollm.data.sets import records_of

    records = records_of(data, role)
    return content_hash(records), len(records)
