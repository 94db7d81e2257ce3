"""Runs a command of Python in a process group of its own, and functions and scripts in forks."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, seconds):
    """What it prints, to stdout and to stderr, and its exit code: None if it did not end in time.

    Gloo's threads now and then do not hear that they should end: what was printed still counts.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return *child.communicate(timeout=seconds), child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)
        return *child.communicate(), None


MODULES = ["processes", "training_processes", "counted_traffic", "sharded_memory"]
"""What such processes run: they are forks of one that imported these and computed nothing."""


def in_processes(work, world, folder, *arguments):
    """What `work(*arguments)` returns in each process of a gloo group, in their order.

    Four processes are two nodes of two. Results go through `folder`.
    """
    start_server()
    given = (work, world, free_port(), Path(folder), arguments)
    torch.multiprocessing.start_processes(_joined, given, nprocs=world, start_method="forkserver")
    return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Of processes that are forks: much of it counts when a package is imported."""


def start_server():
    """Starts the process that forks, once; Python 3.11 does not tell it where to find modules."""
    multiprocessing.set_forkserver_preload(MODULES)
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": path}):
        forkserver.ensure_running()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _joined(rank, work, world, port, folder, arguments):
    os.environ.update(_as_torchrun(rank, world, port))
    gc.freeze()  # what was imported stays
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads now and then do not hear that they should end


def _as_torchrun(rank, world, port):
    local = 2 if world == 4 else world
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
    }


def script(path, *arguments, world=1, seconds):
    """As `python(path, ...)`, where `path` may be -m, or as torchrun in `world` processes.

    In forks of a process that imported `MODULES`, which spares each of them seconds. What all
    print, to stdout and to stderr, and an exit code that is not 0 where there is one, or None where
    one did not end in time.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    port, argv = free_port(), [str(word) for word in (path, *arguments)]
    started, end = [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        outs, errs = (
            [Path(folder, f"{r}.{name}") for r in range(world)] for name in ("out", "err")
        )
        for file in (*outs, *errs):
            file.touch()
        try:
            for rank, streams in enumerate(zip(outs, errs, strict=True)):
                joined = _as_torchrun(rank, world, port) if world > 1 else {}
                given = (argv, {**os.environ, **joined, **ENVIRONMENT}, streams)
                started.append(context.Process(target=_as_script, args=given))
                started[-1].start()
            for one in started:
                one.join(max(0.0, end - time.monotonic()))
            codes = [one.exitcode for one in started]
        finally:
            for one in filter(lambda one: one.pid, started):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)  # what it has started too
                one.kill()
                one.join()
        told = ["".join(file.read_text() for file in files) for files in (outs, errs)]
    return *told, None if None in codes else next(filter(None, codes), 0)


def succeeds(path, *arguments, seconds):
    """What such a script prints, which must end well."""
    out, err, code = script(path, *arguments, seconds=seconds)
    assert code == 0, (code, out + err)
    return out


def _as_script(argv, environment, streams):
    os.setsid()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()
    torch.set_num_threads(1)
    module = argv.pop(1) if argv[0] == "-m" else None
    sys.argv[:] = argv
    code = 0
    try:
        if module is None:
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
