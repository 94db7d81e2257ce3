"""What a run needs from the machine, and what it tells about it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from mollm.errors import UsageError

_PACKAGES = ("mollm", "torch", "transformers", "tokenizers", "gguf", "numpy", "safetensors")


def find_device(name: str) -> torch.device:
    """The Torch device of that name.

    Raises:
        UsageError: This machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device must be one that Torch finds on this machine, such as cpu, but got {name!r}."
        ) from error
    return device


def peak_memory(device: torch.device) -> float:
    """The most memory of `device` that this process has held so far, in bytes; NaN where unknown.

    On the CPU its largest resident memory, on a GPU what Torch has allocated.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        # Not getrusage: a process starts with the peak of the one that started it.
        return _kilobytes(Path("/proc/self/status"), "VmHWM")
    except (OSError, KeyError):
        return float("nan")


def available_memory(device: torch.device) -> float:
    """Memory that a new allocation on `device` can still get, in bytes; inf where unknown.

    On the CPU this is the least of what the kernel calls available and what the limit of the
    container leaves, if there is one. Files that the kernel keeps in memory, such as weights that
    were read, give way and do not count.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_kernel_available(), *_control_group_room()])


def _kernel_available(path: Path = Path("/proc/meminfo")) -> float:
    try:
        return _kilobytes(path, "MemAvailable")
    except (OSError, KeyError):
        return float("inf")


def _kilobytes(path: Path, key: str) -> float:
    """A row such as "MemAvailable:  2000 kB", in bytes."""
    rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return float(rows[key].split()[0]) * 1024


def _control_group_room(root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    for folder, limit, usage, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (
            root / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        try:
            room = float((folder / limit).read_text()) - float((folder / usage).read_text())
        except (OSError, ValueError):  # no such control group, or no limit: the word "max"
            continue
        yield room + _number(folder / "memory.stat", cached)


def _number(path: Path, key: str) -> float:
    """A row such as "inactive_file 4096"; 0 where there is none."""
    try:
        return float(dict(line.split() for line in path.read_text().splitlines())[key])
    except (OSError, ValueError, KeyError):
        return 0.0


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that make a result, and of `more` packages."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        version = _version(package)
        if version is not None:
            found[package] = version
    return found


@cache
def _version(package: str) -> str | None:
    if package == "torch":  # whose own says for which CUDA it was built, unlike PyPI's
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads != 1)}"


CPUINFO = Path("/proc/cpuinfo")


def cpu_flags() -> frozenset[str]:
    """What the processor can do, such as "avx512_bf16", as Linux says; empty if unknown."""
    return frozenset((_of_cpu("flags") or _of_cpu("Features")).split())


def cpu_vendor() -> str:
    """Who made the processor, such as "GenuineIntel", as Linux says; empty if unknown."""
    return _of_cpu("vendor_id")


def _cpu_name() -> str:
    return " ".join(_of_cpu("model name").split()) or platform.processor() or platform.machine()


def _of_cpu(name: str) -> str:
    """What Linux says under this name of the first processor."""
    try:
        rows = (line.partition(":") for line in CPUINFO.read_text().splitlines())
        return next((value.strip() for key, _, value in rows if key.strip() == name), "")
    except OSError:
        return ""


def commit() -> str | None:
    """The commit of the git checkout that holds this package, marked when files have changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head} with changes" if _git(root, "status", "--porcelain") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()
