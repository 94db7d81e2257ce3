"""Folders that change only when what is to be in them is whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mollm.errors import UsageError
from mollm.system.units import GIB

UNFINISHED = ".unfinished-"
"""Begins the names of what is not whole yet."""
_PROBE_BYTES = 4096
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""What flock says on some file systems of a network, which have no locks."""
_PART = r"/[^\s/,;:'\"]+"
_PATHS = re.compile(rf"(?<![\w/.<])(?:file://)?(?:~(?:[A-Za-z_][\w.-]*)?|{_PART})(?:{_PART})+")
_REST = re.compile(rf"(?:{_PART})*")
_WITHIN = re.compile(r"[^\n/]{1,255}?(?=[\s/,;:'\"\])}>]|$)")
_OF_A_USER = re.compile(r"~[^/]*|/root|/(?:home|Users)/[^/]+")
_SHOWN = 200
_LONGEST_PATH = 1024


@contextlib.contextmanager
def staged(out: Path, *, instead_of: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Gives an empty folder to write to, and moves what is in it into `out` at the end.

    Where the block raises, `out` is left as it was. Files of the same names are replaced, others
    in `out` stay. What was written is on the disk before it replaces anything.

    Args:
        out: Where it goes.
        instead_of: Matches the names of files that go from `out` where the block wrote none such.

    Raises:
        UsageError: `out` cannot be made or written, or another process writes to it; found out
            before the block runs.
    """
    with locked(out):
        try:
            stage = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out))
        except OSError as error:
            raise _refused(out, error) from error
        try:
            yield stage
            _permit(stage)
            _sync_all(stage)
            written = {entry.name for entry in stage.iterdir()}
            _move_into(stage, out)
            if instead_of is not None:
                for path in out.iterdir():
                    if instead_of.fullmatch(path.name) and path.name not in written:
                        path.unlink()
            _sync(out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


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
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()


@contextlib.contextmanager
def complete(folder: Path, *, private: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write to, which becomes `folder` at the end, all at once.

    What was written is on the disk before it gets its name: a process that is killed, or a machine
    that loses power, leaves `folder` whole or not there. Where the block raises, nothing is left.
    A folder of that name that is there already is replaced.

    Args:
        folder: Where it goes.
        private: Whether only this user may read what is in it.

    Raises:
        UsageError: There is no room, or `folder` cannot be written.
    """
    stage: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        inner = stage / folder.name  # the outer folder is for this user's eyes alone
        inner.mkdir()
        yield inner
        _permit(inner, private=private)
        _sync_all(inner)
        if folder.exists():
            remove(folder)
        os.rename(inner, folder)
        _sync(folder.parent)
    except OSError as error:
        raise _not_written(folder, error) from error
    except Exception as error:
        if "os error" in str(error) or "I/O error" in str(error):  # as safetensors has it
            raise _not_written(folder, error) from error
        raise
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def replace_text(path: Path, text: str, *, follow_link: bool = True) -> None:
    """Writes a file that holds either what it held before or all of the text, in UTF-8.

    A file that is there keeps its permissions; a device or a pipe stays what it is, and is given
    the text. Of a file's name that is no UTF-8, bytes stand in it
    as \\udcff and the like.

    Args:
        path: The file.
        text: What it is to hold.
        follow_link: Whether a link is followed, as to a file that the user names, or gives way to
            the file, as in a folder that others may have made.

    Raises:
        UsageError: There is no room, or it cannot be written.
    """
    if _is_device(path, follow_link=follow_link):
        try:
            _write_into(path, text)
        except OSError as error:
            raise _not_written(path, error) from error
        return
    target = Path(os.path.realpath(path)) if follow_link else path
    part = target.with_name(f"{UNFINISHED}{target.name}")
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.is_file() else None
        part.touch(0o666 if mode is None else 0o600)
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        if mode is not None:
            part.chmod(mode)
        _sync(part)
        os.replace(part, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _not_written(path, error) from error


def _is_device(path: Path, *, follow_link: bool) -> bool:
    """Whether it is there and neither a file nor a folder, nor a link that is to be replaced."""
    try:
        mode = (path.stat() if follow_link else path.lstat()).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _write_into(device: Path, text: str) -> None:
    """Of a disk nothing is overwritten. Nobody is waited for who might read a pipe: where nobody
    does, that is an OSError."""
    number = os.open(device, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        mode = os.fstat(number).st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
            raise OSError(errno.EINVAL, "it is a disk or a socket")
        os.set_blocking(number, True)
        file.write(text)


def check_writable(out: Path) -> None:
    """Says before a long computation that its results could not be written.

    Tries what will be done at the end: a folder is made, a file is written, and both are removed.

    Raises:
        UsageError: `out` cannot be made, or not be written to.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=UNFINISHED, dir=out) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _refused(out, error) from error
    finally:
        _remove_empty(made)


def check_new_file(path: Path) -> None:
    """Says before a long computation that a file could not be written. Makes its folder.

    Raises:
        UsageError: It is a folder, or it cannot be written.
    """
    part: Path | None = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if _is_device(path, follow_link=True):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.realpath(path))
        part = target.with_name(f"{UNFINISHED}{target.name}")
        part.write_bytes(b"\0" * _PROBE_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{_short(path)} cannot be written: {reason}: name another file."
        ) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()


def check_space(out: Path, needed: int, what: str) -> None:
    """Says before a long computation that its results would not fit on the disk.

    Args:
        out: A folder, which need not exist yet.
        needed: Bytes.
        what: What takes them, in words.

    Raises:
        UsageError: Less is free.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f"{what} take about {needed / GIB:.2f} GiB, but only {free / GIB:.2f} GiB are free in "
            f"{out}: free some, or choose another folder with --out."
        )


def public_name(name: str) -> str:
    """A name for others to read: of a path on this machine, its last part alone."""
    text = str(name).removeprefix("file://")
    if _OF_A_USER.fullmatch(text.rstrip("/")) or text.rstrip("/") == os.path.expanduser("~"):
        return "a local folder"
    local = text.startswith(("/", "~", "./", "../", "\\")) or text[1:3] in (":\\", ":/")
    if not local and text.count("/") < 2:  # a name on the hub has one
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1].lstrip("~") or "a local folder"


def public(value: Any) -> Any:
    """A value, or all within it, for others to read: without the folders of this machine, which
    name its user."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and _is_prose(value):
        return without_paths(value)
    return public_name(str(value)) if isinstance(value, str | Path) else value


def without_paths(text: str) -> str:
    """Words for others to read: of each path on this machine in them, its last part alone."""
    pieces, end = [], 0
    while found := _PATHS.search(text, end):
        pieces += [text[end : found.start()]]
        end = _end_of_path(text, found)
        pieces += [public_name(text[found.start() : end])]
    return "".join([*pieces, text[end:]])


def _end_of_path(text: str, found: re.Match[str]) -> int:
    """Where a path ends: after spaces and quotes too, if it is there on this machine with them."""
    start, end = found.span()
    start += len("file://") * text.startswith("file://", start)
    at = end
    while at < min(len(text), start + _LONGEST_PATH):
        part = _WITHIN.match(text, at) or _WITHIN.match(text, at + 1)
        if part is None:
            break
        at = part.end()
        if os.path.lexists(os.path.expanduser(text[start:at])):
            rest = _REST.match(text, at)
            end = at if rest is None else rest.end()
    return end


def _is_prose(text: str) -> bool:
    """Whether this is words, in which a path may stand, and no path with spaces in it."""
    return len(text.split()) > 1 and not text.startswith(("/", "~", ".", "\\"))


def _not_written(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    shown = Path(*(part for part in path.parts if not part.startswith(UNFINISHED)))
    return UsageError(
        f"{shown} cannot be written: {reason.rstrip('.')}; free some space or change its "
        "permissions, then start again: with --resume, a run goes on from the last checkpoint."
    )


def _refused(out: Path, error: Exception, flag: str = "out") -> UsageError:
    reason = getattr(error, "strerror", None) or str(error)
    return UsageError(
        f"{flag} must be a folder that can be written, but got {_short(out)}: {reason}; "
        f"choose another one with --{flag}."
    )


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def remove(folder: Path) -> None:
    """Removes a folder so that no half of it ever has its name."""
    doomed = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    os.rename(folder, doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what processes that were killed have left in `folder`."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, *, flag: str = "out") -> Iterator[None]:
    """Keeps other processes that ask out of `folder`; a process that dies lets go of it.

    On a file system without locks it keeps nobody out.

    Args:
        folder: Which; it is made where it is not there.
        flag: What the user names it with.

    Raises:
        UsageError: Another process is in it, or it cannot be made.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        raise _refused(folder, error, flag) from error
    try:
        _lock(descriptor, folder, flag)
        yield
    finally:
        os.close(descriptor)
        _remove_empty(made)


def _lock(descriptor: int, folder: Path, flag: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{flag} must be a folder of no other run, but one is writing to {folder}: wait for "
            f"it, or choose another one with --{flag}."
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise _refused(folder, error, flag) from error


def _permit(folder: Path, *, private: bool = False) -> None:
    """Gives files the permissions of this user's other files: safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    if private:
        umask = 0o077
        folder.chmod(0o700)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
