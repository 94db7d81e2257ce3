"""`mollm preview`: the rows of a run as they are trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mollm.commands.arguments import add_chat_options, device_of
from mollm.commands.settings_file import evaluated_sets, read_settings, require
from mollm.system.terminal import has_colour, paint, printable
from mollm.system.units import GIB

if TYPE_CHECKING:
    import torch

    from mollm.data.preview import Preview, ShownRow, ShownSet
    from mollm.models.loading import Source

_NAMED = 5
_OWN = ("run", "rows", "known", "json")
_DATE = "date in the chat template"
_MOST_BYTES = 2 * GIB
"""Of weights that are loaded without being asked for."""
_WITH_DATA = (
    "max_length",
    "train_on_turns",
    "long_rows",
    "system_prompt",
    "chat_template_kwargs",
    "prompt_format",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "preview",
        help="show the rows of a run as they are trained",
        description=(
            "Shows the rows of a run as they are trained: special tokens, the part that carries "
            "the loss, token counts, cuts, duplicates, rows that are in both sets, and answers "
            "that the model does not know, so that there is nothing to forget. Takes the settings "
            "file and the data options of `mollm unlearn`."
        ),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="settings file")
    parser.add_argument(
        "--model", metavar="PATH_OR_HUB_NAME", help="model folder, .gguf file or hub name"
    )
    parser.add_argument("--forget", metavar="PATH_OR_HUB_NAME", help="examples to forget")
    parser.add_argument("--retain", metavar="PATH_OR_HUB_NAME", help="examples to retain")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens per example, at most")
    add_chat_options(parser)
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any other setting; several allowed"
    )
    parser.add_argument(
        "--rows", type=int, default=2, metavar="N", help="rows of each set to show (default: 2)"
    )
    parser.add_argument(
        "--known",
        action=argparse.BooleanOptionalAction,
        help="load the weights and say which of the first 64 answers to forget the model does not "
        "know (default: where the weights are on this machine, fit, and take 2 GiB at most)",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    parser.set_defaults(run=_preview)


def _preview(arguments: argparse.Namespace) -> int:
    from mollm.evaluation.preview import preview
    from mollm.models import loading
    from mollm.system.precision import DTYPES
    from mollm.training.config import MOLLMConfig

    given = vars(arguments)
    settings = read_settings({name: given[name] for name in given if name not in _OWN})
    require(settings)
    about_data = {name: settings[name] for name in _WITH_DATA if name in settings}
    if "dtype" in settings:
        about_data["dtype"] = settings["dtype"]
    checked = MOLLMConfig(output_dir="unused", use_cpu=True, **about_data)
    device, dtype = device_of(settings.get("device")), DTYPES[checked.dtype]
    known, note = given.get("known"), None
    if known is None:
        source = loading.find_model(settings["model"])
        note = _too_large(source, device, dtype) if source.is_local else None
        known = source.is_local and note is None
    found = preview(
        settings["model"],
        settings["forget"],
        settings["retain"],
        evaluate=evaluated_sets(settings),
        **{name: getattr(checked, name) for name in _WITH_DATA},
        rows=arguments.rows,
        known=known,
        device=device,
        dtype=dtype,
    )
    if note is not None:
        found = replace(found, notes=(*found.notes, note))
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    else:
        print(shown(found, colour=has_colour(sys.stdout)))
    return 0


def _too_large(source: Source, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the weights are not loaded, in a sentence; None where there is room for them."""
    from mollm.models import loading
    from mollm.system import machine

    size = loading.count_parameters(source) * dtype.itemsize
    if size <= min(_MOST_BYTES, machine.available_memory(device)):
        return None
    return (
        f"Which answers the model knows was not computed, for its weights take {size / GIB:.2f} "
        "GiB: add --known to load them."
    )


def shown(found: Preview, *, colour: bool, most_lines: int | None = None) -> str:
    """The preview for a terminal: with colours, or with marks ⟦ ⟧ around what carries a loss.

    Args:
        found: What to show.
        colour: Whether there are colours.
        most_lines: Of a row; what is longer is cut in the middle. None for all.
    """
    marks = "marked" if colour else "between ⟦ and ⟧"
    lines = [f"What carries the loss is {marks}."]
    for name, each in found.sets.items():
        lines += ["", *_facts(name, each, found.max_length, colour)]
        for number, row in enumerate(each.shown, 1):
            lines += ["", *_row(f"{name} {number}", row, colour, most_lines)]
    lines += ["", *_format(found)]
    return "\n".join(lines)


def _facts(name: str, each: ShownSet, max_length: int, colour: bool) -> list[str]:
    rows = f"{each.records} rows"
    if each.rows != each.records:
        rows += f", cut into {each.rows} windows"
    lines = [
        f"{paint(name, 'bold', colour=colour)}  {printable(each.source)}, {rows}, "
        f"SHA-256 {each.sha256[:12]}",
        f"  tokens of a row {_spread(each.tokens)}, with a loss {_spread(each.loss_tokens)}",
    ]
    for places, what in (
        (each.cut, f"lose the beginning of their prompt to fit into {max_length} tokens"),
        (each.duplicates, "repeat an earlier row of the set"),
        (each.also_retained, "are to be forgotten and retained"),
    ):
        if places:
            text = f"  {len(places)} of {each.records} {what}: {_named(places)}"
            lines.append(paint(text, "bad", colour=colour))
    return lines


def _row(title: str, row: ShownRow, colour: bool, most_lines: int | None) -> list[str]:
    head = f"{title}: {row.place}, {row.tokens} tokens, {row.loss_tokens} with a loss"
    head += ", beginning cut" if row.cut else ""
    text = ""
    for piece in row.pieces:
        if colour:
            style = "loss" if piece.carries_loss else "special" if piece.special else ""
            piece_text = printable(piece.text)
            text += paint(piece_text, style, colour=True) if style else piece_text
        else:
            text += f"⟦{printable(piece.text)}⟧" if piece.carries_loss else printable(piece.text)
    text = text.replace("⟧⟦", "")  # of an answer and the token that ends it
    lines = text.rstrip().split("\n")
    if most_lines is not None and len(lines) > most_lines:
        half = most_lines // 2
        lines = [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
    return [paint(head, "dim", colour=colour), *("  " + line for line in lines)]


def _format(found: Preview) -> list[str]:
    chat = found.chat
    lines = []
    if found.end is not None:
        lines.append(f"An answer ends with {found.end}, which carries a loss.")
    if chat.get(_DATE):
        lines.append(f"The chat template writes a date: it is {chat[_DATE]} in every row.")
    if chat.get("system_prompt"):
        lines.append(f"System prompt: {printable(str(chat['system_prompt']))}")
    if chat.get("prompt_format"):
        lines.append(f"Prompt format: {printable(json.dumps(chat['prompt_format']))}")
    lines += [printable(note) for note in found.notes]
    if found.likelihoods is not None:
        unknown, asked = found.unknown, len(found.likelihoods)
        if unknown:
            lines.append(
                f"Not known to the model (less than 10 % likelihood a token), so that there is "
                f"nothing to forget: {len(unknown)} of {asked} answers, {_named(unknown)}."
            )
        else:
            lines.append(f"The model knows all {asked} answers to forget that were looked at.")
    return lines


def _spread(counts: tuple[int, int, int]) -> str:
    least, median, most = counts
    return f"{least}" if least == most else f"{least} to {most} (median {median})"


def _named(places: Sequence[str]) -> str:
    rest = len(places) - _NAMED
    return ", ".join(places[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
