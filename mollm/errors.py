"""Errors that a user can put right."""


class UsageError(ValueError):
    """A mistake in what was asked for, told in one sentence that names the way out.

    The command line prints the sentence and exits with status 2; no traceback is shown.
    """
