"""What a run needs from the machine, and what it tells about it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GB = 1e9
_PACKAGES = ("mollm", "torch", "transformers", "tokenizers", "gguf", "numpy", "safetensors")


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far, in 1e9 bytes; NaN where unknown."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def available_memory_gb(device: torch.device) -> float:
    """Memory that a new allocation on `device` can still get, in 1e9 bytes; inf where unknown.

    On the CPU this is the least of what the kernel calls available and what the limits of the
    process's control groups leave: a container often has less than its host.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GB
    return min([_kernel_available(), *_control_group_room()]) / GB


def return_freed_memory() -> None:
    """Makes the C library give large freed blocks back to the system at once.

    By default glibc learns from the first large blocks that are freed to keep later ones of up to
    32 MB in its heap; the gradients of a language model, made and freed in every step, then leave
    holes that cost half a gigabyte. Elsewhere this does nothing.
    """
    m_mmap_threshold, one_megabyte = -3, 1 << 20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, one_megabyte)


def _kernel_available(path: Path = Path("/proc/meminfo")) -> float:
    try:
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return float(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _control_group_room(root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            yield float((root / limit).read_text()) - float((root / usage).read_text())
        except (OSError, ValueError):  # no such control group, or no limit: the word "max"
            continue


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    try:
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return " ".join(next(rows[key] for key in rows if key.strip() == "model name").split())
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the git checkout that holds this package, marked when files have changed."""
    root = Path(__file__).resolve().parent.parent
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
