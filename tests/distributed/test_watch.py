"""Processes that die or hang are found by the others, which end and name them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launch
import pytest

from mollm.distributed import watch
from mollm.errors import UsageError


class Store(dict):
    """What Watch asks of a store of Torch's."""

    def set(self, key, value):
        if self.get("gone"):
            raise RuntimeError("Connection reset by peer")
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL", 0.02)
    monkeypatch.setattr(watch, "PATIENCE", 0.5)


@pytest.fixture
def watched(quick):
    """Two processes of three that watch each other in one store, and what they say at the end."""
    store, said, ended = Store(), {}, threading.Event()
    made = {}

    def end_of(rank):
        def end(sentence):
            said[rank] = sentence
            ended.set()

        return end

    for rank in (0, 1):
        made[rank] = watch.Watch(store, rank, 2, end_of(rank))
    yield store, made, said, ended
    for one in made.values():
        one.stop()


def test_processes_that_live_or_have_left_are_let_be(watched):
    _, made, said, ended = watched
    assert not ended.wait(1.2)
    made[1].stop()
    assert not ended.wait(1.2)
    assert said == {}


def test_a_process_without_a_sign_of_life_is_named(watched):
    _, made, said, ended = watched
    made[1]._stopped.set()  # as if it had been killed
    assert ended.wait(5)
    assert said[0].startswith("process 1 of 2 has died or hangs")
    assert "resume from the last checkpoint" in said[0]


def test_a_process_that_failed_is_named_without_delay(watched):
    _, made, said, ended = watched
    made[1].stop(watch._FAILED)
    assert ended.wait(0.4)
    assert said == {0: "process 1 of 2 has failed; " + said[0].partition("; ")[2]}


def test_a_store_that_is_gone_is_the_first_process_or_the_launcher(watched):
    store, _, said, ended = watched
    store["gone"] = True
    assert ended.wait(5)
    time.sleep(0.2)
    assert said[1].startswith("process 0 of 2, or the launcher, has died")
    assert 0 not in said  # it hears nothing, and blames nobody


def test_errors_that_are_no_broken_connection_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(watch, "_watch", object())
    monkeypatch.setattr(watch.time, "sleep", lambda _: pytest.fail("waits"))
    for error in (UsageError("Connection"), RuntimeError("out of memory")):
        with pytest.raises(type(error)), watch.blaming_the_dead():
            raise error


SCRIPT = """
import os, signal, sys, time
rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
import torch.distributed as dist
from mollm.distributed import processes, watch
watch.INTERVAL, watch.PATIENCE = 0.2, 3.0
dist.init_process_group("gloo")
watch.watch()
processes.barrier()
print("there", flush=True)
if rank == 1 and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 and how == "hangs":
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGSTOP)
with watch.blaming_the_dead():
    processes.barrier()
    processes.barrier()
"""


JOIN = """
import os, sys
rank, port, seconds = sys.argv[1:]
os.environ.update(RANK=rank, WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
from mollm.distributed import watch
watch.JOINING = float(seconds)
import torch.distributed as dist
watch.await_others()
dist.init_process_group("gloo")  # at the same port
dist.barrier()
print("together", flush=True)
"""


@pytest.mark.parametrize(
    ("come", "seconds", "words"),
    [
        ([0, 1], "10", {0: "2 of 3 did not come within 10 s", 1: "of 3 "}),
        ([1], "3", {1: "process 0 of 3 is not there"}),
        ([0, 1, 2], "90", {}),
    ],
    ids=str,
)
def test_a_process_that_dies_before_it_joins_is_named(come, seconds, words):
    port, root = str(launch.free_port()), Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    alone = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    children = {
        rank: subprocess.Popen(
            [sys.executable, "-c", JOIN, str(rank), port, seconds],
            env={**alone, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in come
    }
    try:
        for rank, child in children.items():
            out, err = child.communicate(timeout=120)
            if rank in words:
                assert child.returncode == 1
                assert "mollm: process" in err
                assert words[rank] in err
            else:
                assert "together" in out, err
    finally:
        for child in children.values():
            child.kill()
            child.wait()


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_two_processes_without_a_launcher_end_when_one_does(how):
    port = str(launch.free_port())
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), port, how],
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, told = children[0].communicate(timeout=90)
        assert children[0].returncode == 1
        assert "mollm: process 1 of 2 has died or hangs" in told
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()
