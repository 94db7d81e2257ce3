"""Errors that a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in what was asked for, described in one sentence that names the way out.

    The command line prints the sentence and exits with status 2; no traceback is shown.

    Example:
        >>> from mollm import load_records
        >>> try:
        ...     load_records("nothing.jsonl", role="forget")
        ... except UsageError as error:
        ...     print(error)
        data must be a .jsonl, ... but got nothing.jsonl, which is not on this machine.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How a sentence about an unknown name ends: with the known one that is close, or a stop."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "."
