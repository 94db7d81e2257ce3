"""What the commands' arguments share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.planning.settings import BYTES
from mollm.system.parsing import parse_yaml

if TYPE_CHECKING:
    import torch

EXIT_FAILED = 1
"""The exit status of a command whose run failed, or whose results do not hold."""
NO_ORIGINAL = "none"
"""Given as the original where there is to be none."""
CHAT_OPTIONS = ("system_prompt", "chat_template_kwargs", "prompt_format")
"""How a model is spoken to, as flags and as settings of a run."""


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


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a model is spoken to."""
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="system prompt of conversations that have none of their own",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="YAML",
        help="options of the chat template, such as '{enable_thinking: false}'",
    )
    parser.add_argument(
        "--prompt-format",
        metavar="TEXT_OR_YAML",
        help="none for plain text, chat, or a template such as 'Q: {question}\\nA: {answer}', in "
        "which \\n is a new line; with more options '{template: ..., prefix: ..., stop: [...]}' "
        "(default: the chat template; without one, questions are asked and other rows go on)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that load a model and ask it."""
    add_chat_options(parser)
    parser.add_argument(
        "--dtype",
        choices=BYTES,
        default="float32",
        help="dtype of weights and computation (default: float32)",
    )
    parser.add_argument(
        "--device",
        help="a Torch device (default: cuda where there is a GPU, else cpu)",
    )


def template_options(text: str | None) -> dict[str, Any] | None:
    """What --chat-template-kwargs says.

    Raises:
        UsageError: It says something else than options by name.
    """
    options = None if text is None else parse_yaml(text, "chat-template-kwargs")
    if isinstance(options, dict | None):
        return options
    raise UsageError(
        "chat-template-kwargs must be options by name, such as '{enable_thinking: false}', but "
        f"got {text!r}."
    )


def format_of(text: str | None) -> str | dict[str, Any] | None:
    """What --prompt-format says.

    Raises:
        UsageError: It is no format.
    """
    from mollm.data.prompt_format import QUESTION, PromptFormat

    if text is None:
        return None
    found: Any = text
    if text.startswith("{") and not text.startswith(QUESTION):
        found = parse_yaml(text, "prompt-format")
    found = _with_new_lines(found)
    PromptFormat.of(found)
    return found if isinstance(found, dict) else str(found)


def _with_new_lines(value: Any) -> Any:
    r"""The value with a new line for each \n in its texts: quotes may leave the two letters."""
    if isinstance(value, str):
        return value.replace("\\n", "\n")
    if isinstance(value, dict):
        return {name: _with_new_lines(one) for name, one in value.items()}
    return [_with_new_lines(one) for one in value] if isinstance(value, list) else value


def chat_options(given: Mapping[str, Any], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a model is spoken to: as the command line says, else as the run that made it did.

    Args:
        given: Arguments of the command line by name.
        run: The facts of the run; None where there is none.

    Raises:
        UsageError: The command line says none of that.
    """
    said = {
        "system_prompt": given.get("system_prompt"),
        "chat_template_kwargs": template_options(given.get("chat_template_kwargs")),
        "prompt_format": format_of(given.get("prompt_format")),
    }
    known = {} if run is None else run["settings"]
    return {name: known.get(name) if one is None else one for name, one in said.items()}


def chat_words(chat: Mapping[str, Any]) -> list[str]:
    """The flags that say so, as far as there is something to say."""
    words = []
    for name in CHAT_OPTIONS:
        value = chat.get(name)
        if value not in (None, {}):
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def add_long_rows(parser: argparse.ArgumentParser) -> None:
    """The option for rows that do not fit into a model's context."""
    parser.add_argument(
        "--long-rows",
        default=argparse.SUPPRESS,
        choices=("cut", "skip"),
        help="what becomes of questions too long for the model's context: they lose their "
        "beginning, or are left out (default: as in the run, else cut)",
    )


def check_seed(seed: int) -> None:
    """Refuses what is no seed of every generator.

    Raises:
        UsageError: It is out of range.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be from 0 to {2**32 - 1}, but got {seed}.")


def device_of(name: str | None) -> torch.device:
    """The device of that name; None for a GPU where there is one, else the CPU.

    Raises:
        UsageError: There is no such device.
    """
    import torch

    from mollm.system import machine

    return machine.find_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def data_of(text: str) -> Any:
    """A path or name, a mapping with a path and options, or a list of rows."""
    return parse_yaml(text, "data") if text.startswith(("{", "[")) else text
