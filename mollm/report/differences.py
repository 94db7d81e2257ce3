"""Two texts beside each other, with what only one of them says marked."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Some words of a text."""

    text: str
    differs: bool
    """Whether the other text does not have them here."""


def differences(before: str, after: str) -> tuple[list[Part], list[Part]]:
    """Both texts in parts, compared word by word."""
    old, new = (_words(text) for text in (before, after))
    said, says = ([word.strip() for word in words] for words in (old, new))
    matcher = difflib.SequenceMatcher(None, said, says, autojunk=False)
    left: list[Part] = []
    right: list[Part] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        for side, words in ((left, old[i1:i2]), (right, new[j1:j2])):
            if words:
                side.append(Part("".join(words), kind != "equal"))
    return left, right


def _words(text: str) -> list[str]:
    found: list[str] = re.findall(r"\S+\s*", text.strip())
    return found
