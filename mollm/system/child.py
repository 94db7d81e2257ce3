"""A task that may hang or fill the memory, tried out in a process of its own first."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mollm.system.parsing import reason_of
from mollm.system.units import GIB


def why_not(task: Callable[[], object], seconds: float, more_bytes: int) -> str | None:
    """Runs a task in a copy of this process, where it can do no harm, and forgets what it did.

    The task should be Python and small: other threads of this process are not in the copy.

    Args:
        task: What to run. What it prints is lost.
        seconds: The time that it may take.
        more_bytes: The memory that it may take on top of what this process has.

    Returns:
        None where the task ends well, else why it does not.
    """
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on, of threads
        pid = os.fork()
    if pid == 0:  # never returns, whatever happens
        try:
            _run(task, theirs, more_bytes)
        finally:
            os._exit(1)
    os.close(theirs)
    told = b""
    try:
        end = time.monotonic() + seconds
        while select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(ours, 4096)
            if not part:
                break
            told += part
        else:
            return f"it takes more than {seconds:g} seconds"
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    text = told.decode(errors="replace")
    return None if text == _WELL else text or "it takes too much memory, or ends the process"


_WELL = "\0well"


def _run(task: Callable[[], object], out: int, more_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # they may lead elsewhere
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        task()
        told = _WELL
    except MemoryError:
        told = f"it takes more than {more_bytes / GIB:.0f} GiB of memory"
    except BaseException as error:  # also that of a panic in Rust
        told = reason_of(error)
    os.write(out, told.encode(errors="replace"))
