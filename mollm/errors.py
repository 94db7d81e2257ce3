"""Errors that a user can put right."""


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
