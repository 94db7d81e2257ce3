import subprocess
import sys

import pytest
import torch

from mollm.system import machine
from mollm.system.units import GIB

CPU = torch.device("cpu")


def test_available_memory_is_that_of_this_machine():
    assert 0.05 * GIB < machine.available_memory(CPU) < 1e5 * GIB


def test_a_control_group_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert list(machine._control_group_room(tmp_path)) == [2e9]
    # cached files give way to what is allocated
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 600000000\n")
    assert list(machine._control_group_room(tmp_path)) == [2.6e9]
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("5000000000\n")
    (old / "memory.usage_in_bytes").write_text("4000000000\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500000000\n")
    assert list(machine._control_group_room(tmp_path)) == [2.6e9, 1.5e9]
    (old / "memory.limit_in_bytes").unlink()
    (tmp_path / "memory.max").write_text("max\n")
    assert list(machine._control_group_room(tmp_path)) == []


def test_the_kernel_tells_kilobytes(tmp_path):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:  9 kB\nMemAvailable:    2000 kB\n")
    assert machine._kernel_available(info) == 2000 * 1024
    assert machine._kernel_available(tmp_path / "missing") == float("inf")


def test_peak_memory_grows_with_what_is_held():
    code = (
        "import functools, torch; from mollm.system.machine import peak_memory;"
        "peak = functools.partial(peak_memory, torch.device('cpu')); before = peak();"
        "held = bytearray(b'x') * 300_000_000; assert 2.9e8 < peak() - before < 4e8"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_versions_and_device():
    versions = machine.versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "transformers", "numpy"} <= versions.keys()
    assert "thread" in machine.device_name(CPU)


def test_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    package = tmp_path / "mollm" / "system"
    package.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    assert machine.commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    head = machine.commit()
    assert head is not None
    assert len(head) == 40
    (tmp_path / "new").write_text("x")
    assert machine.commit() == f"{head} with changes"


@pytest.mark.gpu
def test_available_memory_of_a_gpu():
    assert 0 < machine.available_memory(torch.device("cuda")) < 1e4 * GIB
