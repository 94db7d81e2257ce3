"""Runs a command of Python in a process group of its own, and functions in gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(MODULES)
    given = (work, world, port, Path(folder), arguments)
    torch.multiprocessing.start_processes(_joined, given, nprocs=world, start_method="forkserver")
    return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _joined(rank, work, world, port, folder, arguments):
    local = 2 if world == 4 else world
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank % local),
        LOCAL_WORLD_SIZE=str(local),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads now and then do not hear that they should end
