"""Runs of `mollm unlearn` on a machine whose disk fills up or whose clock jumps.

One process imports everything once and forks a child for every run. `python faulty_machines.py
FOLDER` prints what it tried; it ends with an error where a run did not end in one sentence, left a
checkpoint that is no good, or resumed to another model than that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny
import torch
from killed_runs import command, digest

from mollm.cli import main
from mollm.models import loading
from mollm.training import checkpoint

DAY = 86_400.0


def outcome(arguments: list[str], before: Callable[[], object]) -> tuple[int, str]:
    """Runs a command line in a child, after something was done to it: its status and its words."""
    ours, theirs = os.pipe()  # a file for its words would be limited too
    child = os.fork()
    if child == 0:
        for descriptor in (1, 2):
            os.dup2(theirs, descriptor)
        status = 99
        try:
            os.close(ours)
            before()
            status = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(theirs)
    with os.fdopen(ours, errors="replace") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def limit_files(size: int) -> None:
    """No file may grow beyond `size` from now on: writing raises, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def jumping_clock(seed: int) -> Callable[[], None]:
    """The wall clock jumps by up to a day, to and fro, whenever it is asked."""

    def install() -> None:
        rng, real = random.Random(seed), time.time
        time.time = lambda: real() + rng.uniform(-DAY, DAY)
        time.time_ns = lambda: int(time.time() * 1e9)

    return install


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system in memory of that size, where this user may mount one; else False."""
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(call, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def check_sentence(status: int, text: str) -> None:
    """A full disk is told in one sentence, last, and without a traceback."""
    lines = text.strip().splitlines()
    if status != 2 or "Traceback" in text or not lines[-1].startswith("mollm: "):
        sys.exit(f"status {status}:\n{text}")
    print(lines[-1])


def resumed(arguments: list[str], out: Path) -> str:
    """The model after what was left is resumed, or begun anew, without a fault."""
    for path in checkpoint.checkpoints(out):
        if not (path / "mollm.json").exists():
            sys.exit(f"{path} is no whole checkpoint")
    status, text = outcome([*arguments, "--resume"], lambda: None)
    if status != 0:
        sys.exit(f"did not resume: {text}")
    return digest(out)


def run(folder: Path) -> None:
    """Tries every fault."""
    torch.set_num_threads(1)  # threads do not survive a fork
    model, whole = folder / "model", folder / "whole"
    loading.save(tiny.model(), tiny.tokenizer(), model)
    status, text = outcome(command(model, whole), lambda: None)
    assert status == 0, text
    expected = digest(whole)
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]

    def verdict(name: str, found: str) -> None:
        print(f"{name}: {found == expected}", flush=True)
        if found != expected:
            sys.exit(f"{name} ended with another model")

    for size in (0, 100, max(sizes) // 3, max(sizes) - 1):
        out = folder / f"limit-{size}"
        check_sentence(*outcome(command(model, out), lambda size=size: limit_files(size)))
        verdict(f"files of {size} bytes at most", resumed(command(model, out), out))
    for share in (0.05, 0.4, 0.8):
        with small_disk(folder / f"disk-{share}", int(share * sum(sizes))) as mounted:
            if not mounted:
                print("no file system could be mounted")
                break
            out, moved = folder / f"disk-{share}" / "out", folder / f"moved-{share}"
            check_sentence(*outcome(command(model, out), lambda: None))
            if out.exists():
                shutil.copytree(out, moved)
            verdict(f"{share:.0%} of the room", resumed(command(model, moved), moved))
    for seed in range(3):
        out = folder / f"clock-{seed}"
        status, text = outcome(command(model, out), jumping_clock(seed))
        assert status == 0, text
        verdict(f"a clock that jumps, {seed}", digest(out))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
