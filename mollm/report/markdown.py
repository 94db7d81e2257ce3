"""Texts of strangers in Markdown: neither Markdown nor HTML in them acts."""

from __future__ import annotations

import html
import re
from typing import Any

from mollm.system.folders import without_paths
from mollm.system.terminal import printable

_ACTS = re.compile(r"[\\`*_{}\[\]#|~!$@]|(?<=\w)://|(?<=\bwww)\.|^[-+>=]")
"""Signs of Markdown, and what sites that show it make links, mentions and formulas of."""
_NUMBERED = re.compile(r"^(\d{1,9})([.)])")
_PLAIN = re.compile(r"[^`|<>&\\]*")


def as_text(value: Any) -> str:
    """A text that shows as it is, on one line; of paths on this machine the last part alone.

    Example:
        >>> as_text("<b>a|b</b>, see /home/ada/notes.txt")
        '&lt;b&gt;a\\\\|b&lt;/b&gt;, see notes.txt'
    """
    line = html.escape(_one_line(without_paths(str(value))), quote=False)
    return _NUMBERED.sub(r"\1\\\2", _ACTS.sub(r"\\\g<0>", line))


def as_code(value: Any) -> str:
    """The same in the type of code."""
    line = _one_line(without_paths(str(value)))
    if not line or not _PLAIN.fullmatch(line):
        return f"<code>{as_text(line)}</code>" if line else ""
    return f"`{line}`"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
