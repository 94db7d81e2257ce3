"""Kills runs of `mollm unlearn` at random moments, resumes them, and compares their models.

One process imports everything once and forks a child for every run; it prints, for each kill, when
it came and whether the resumed run ended with the model of the undisturbed one.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny
import torch

from mollm.cli import main
from mollm.data.files import sample_path
from mollm.models import loading
from mollm.training import checkpoint, trainer

STEPS = 8
LOADED = trainer  # before the fork, so that a kill meets the run and not its imports


def command(model, out):
    return [
        *("unlearn", "--model", str(model), "--out", str(out), "--device", "cpu"),
        *("--forget", str(sample_path("authors-forget.jsonl"))),
        *("--retain", str(sample_path("authors-retain.jsonl"))),
        *("--max-length", "400", "--learning-rate", "1e-3", "--max-steps", str(STEPS)),
        *("--per-device-train-batch-size", "2", "--reference", "cache"),
        *("--set", "save_steps=1", "--set", "disable_tqdm=true"),
    ]


def start(arguments, log):
    child = os.fork()
    if child == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 99
        try:
            status = main(arguments)
        finally:
            os._exit(status)
    return child


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(out):
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def kill_and_resume(model, folder, number, delay):
    """Whether the run could be killed before its end, and the digest of the resumed one."""
    out, log = folder / f"run-{number}", folder / f"run-{number}.log"
    child = start(command(model, out), log)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    if finish(child) != -signal.SIGKILL or (out / "model").exists():
        return "too late", digest(out)
    found = [path.name for path in checkpoint.checkpoints(out)]
    where = "in a save" if list(out.glob(".unfinished-*")) else "elsewhere"
    status = finish(start([*command(model, out), "--resume"], log))
    if status != 0:
        sys.exit(f"run {number}, killed after {delay:.3f} s, did not resume:\n{log.read_text()}")
    return f"{where}, after {found[-1] if found else 'no checkpoint'}", digest(out)


def run(folder, kills, seed=0):
    torch.set_num_threads(1)  # threads do not survive a fork
    model = folder / "model"
    loading.save(tiny.model(), tiny.tokenizer(), model)
    started = time.perf_counter()
    assert finish(start(command(model, folder / "whole"), folder / "whole.log")) == 0
    duration = time.perf_counter() - started
    expected, rng = digest(folder / "whole"), random.Random(seed)
    killed = number = 0
    while killed < kills:
        delay = rng.uniform(0, duration)
        where, found = kill_and_resume(model, folder, number, delay)
        print(
            f"run {number}: {delay:.3f} of {duration:.3f} s, {where}: {found == expected}",
            flush=True,
        )
        if found != expected:
            sys.exit(f"run {number} ended with another model")
        killed += where != "too late"
        number += 1
    print(f"killed {killed}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
