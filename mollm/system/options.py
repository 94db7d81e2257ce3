"""The fields of a dataclass of settings as options of the command line.

A field has its option's help in its metadata, and what else the option is made of:

    help       what it sets; a field without one has no option
    flag       its name there, if it is not the field's
    metavar    what stands for its value in the help
    choices    the values that it may have
    type       what makes a value of a text, if the field's own type does not
    default    the default in words, where it depends on something
"""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mollm.system.parsing import user_path


def flag_of(option: Field[Any]) -> str:
    """The name of a field's option."""
    return str(option.metadata.get("flag", f"--{option.name.replace('_', '-')}"))


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds the options of a dataclass.

    A default of None or of nothing is left out of what the parser gives, and so is one that is
    written in words: the dataclass has it.
    """
    types = get_type_hints(settings)
    for option in fields(settings):
        about = dict(option.metadata)
        if "help" not in about:
            continue
        about.pop("flag", None)
        words = about.pop("default", None)
        hint = types[option.name]
        kind = next((t for t in get_args(hint) if t is not NoneType), hint)
        if kind is bool:
            about["action"] = "store_true"
        else:
            about.setdefault("type", user_path if kind is Path else kind)
        if words is not None:
            about["help"] += f" (default: {words})"
        shown = words is None and kind is not bool and option.default not in (None, ())
        about["default"] = option.default if shown else argparse.SUPPRESS
        parser.add_argument(flag_of(option), dest=option.name, **about)
