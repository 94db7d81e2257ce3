"""What a person sees in a terminal: colours, columns, progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import zip_longest
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "good": "32", "bad": "31", "loss": "1;30;43", "special": "35"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SHARE = 0.1
_WIDE = "WF"

Done = Callable[[int], None]
"""Called with how much more is done."""


def quietly(count: int) -> None:
    """Shows nothing."""


def has_colour(stream: TextIO) -> bool:
    """Whether colours are shown: on a terminal, as NO_COLOR and FORCE_COLOR have it."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, *, colour: bool) -> str:
    """The text in a style, each of its lines for itself; as it is without colour."""
    if not colour or not text:
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[{_CODES[style]}m{line}\x1b[0m" if line else line for line in lines)


def printable(text: str) -> str:
    """The text with a sign for every character that would act on the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def width_of(text: str) -> int:
    """How many cells of a terminal a line takes."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in _WIDE)
        for c in text
    )


def terminal_width(most: int = 120) -> int:
    """How many cells a line has, at most `most`."""
    return max(40, min(most, shutil.get_terminal_size((100, 24)).columns))


def wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The lines of a text that comes in pieces, each as soon as it is full; breaks at spaces."""
    line = ""
    for piece in pieces:
        line += printable(piece)
        while "\n" in line or width_of(line) > width:
            head, found, rest = line.partition("\n")
            if found and width_of(head) <= width:
                yield head
                line = rest
                continue
            fits, cells = 0, 0
            for letter in line:
                cells += width_of(letter)
                if cells > width:
                    break
                fits += 1
            space = line.rfind(" ", 0, fits + 1)
            cut = space if space > 0 else max(1, fits)
            yield line[:cut].rstrip()
            line = line[cut:].lstrip(" ")
    if line:
        yield line


def side_by_side(columns: Iterable[Iterable[str]], width: int) -> Iterator[str]:
    """Lines of several columns beside each other, each as soon as all columns have theirs.

    Args:
        columns: The lines of each, of at most `width` cells.
        width: Of a column.
    """
    for lines in zip_longest(*columns, fillvalue=""):
        padded = (line + " " * (width - width_of(line)) for line in lines)
        yield " │ ".join(padded).rstrip()


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook in which widgets can be shown."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ()) and find_spec("ipywidgets") is not None


@contextmanager
def progress(total: int, what: str, stream: TextIO | None = None) -> Iterator[Done]:
    """Shows how much of `total` is done: a bar on a terminal or in a notebook that has widgets,
    else a line every tenth of it.

    Args:
        total: How much there is to do; 0 shows nothing.
        what: The words before it.
        stream: Where it is shown; standard error if None.
    """
    stream = stream or sys.stderr
    if not total:
        yield quietly
    elif stream.isatty() or in_notebook():
        from tqdm.auto import tqdm

        with tqdm(
            total=total, desc=what, file=stream, leave=False, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
        ) as bar:  # fmt: skip
            yield lambda count: (bar.update(count), None)[1]
    else:
        yield _Lines(total, what, stream)


class _Lines:
    """Progress as lines, for logs."""

    def __init__(self, total: int, what: str, stream: TextIO) -> None:
        self._total, self._what, self._stream = total, what, stream
        self._done, self._told, self._start = 0, 0.0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        share = min(1.0, self._done / self._total)
        if share - self._told >= _SHARE or (share == 1 and self._told < 1):
            self._told = share
            gone = time.monotonic() - self._start
            left = gone * (1 - share) / share
            print(f"{self._what} {share:.0%}, {left:.0f} s left", file=self._stream, flush=True)
