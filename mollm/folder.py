"""A result folder that changes only when a run has succeeded."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mollm.errors import UsageError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Gives an empty folder to write to, and moves what is in it into `out` at the end.

    Where the block raises, `out` is left as it was. Files of the same names are replaced, others
    in `out` stay.

    Raises:
        UsageError: `out` cannot be made or written; found out before the block runs.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(
            f"out must be a folder that can be written, but got {out}: {error.strerror}; "
            "choose another one with --out."
        ) from error
    try:
        yield stage
        _move_into(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)


def _move_into(stage: Path, out: Path) -> None:
    replaced = Path(tempfile.mkdtemp(prefix="replaced-", dir=stage))
    for entry in sorted(stage.iterdir()):
        if entry == replaced:
            continue
        target = out / entry.name
        if target.is_dir():  # os.replace does not take the place of a folder that holds files
            os.replace(target, replaced / entry.name)
        os.replace(entry, target)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
