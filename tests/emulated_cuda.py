"""The extension with its CUDA part on a CPU: csrc/*.cu as C++, see cuda_emulator/emulator.h."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
SHIM = Path(__file__).with_name("cuda_emulator")
ADDRESSES = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
# Order, blocks at a time, and how often a thread gives its turn away.
ORDERS = [(0, 1, 0.0), (1, 1, 0.0), (2, 1, 0.0), (2, 3, 0.02), (2, 64, 0.1)]


def translated(text: str, number: Iterator[int]) -> str:
    """A CUDA source as C++: launches and variables in shared memory, which get a `number`, are
    written out anew."""
    shared, launches = text.count("__shared__"), text.count("<<<")

    def variable(m: re.Match[str]) -> str:
        kind = f"{m[1]}{m[3] or ''}"
        return f"auto& {m[2]} = ::emulator::shared<{kind}>({next(number)});"

    def launch(m: re.Match[str]) -> str:
        grid, block, *_ = m[2].split(",")
        return f"::emulator::launch({grid}, {block}, [=] {{ {m[1]}({m[3]}); }});"

    text, a = re.subn(r"__shared__\s+([\w:]+(?:<\w+>)?)\s+(\w+)(\[[^\]]*\])?;", variable, text)
    call = r"([\w:]+(?:<[^<>;{}]*>)?)\s*<<<(.*?)>>>\s*\(([^;]*?)\);"
    text, b = re.subn(call, launch, text, flags=re.S)
    assert (a, b) == (shared, launches), "a form of __shared__ or <<< >>> that is not known here"
    return text


def build(flags: Sequence[str] = (), fault: tuple[str, str, str] | None = None) -> Path:
    """The extension, from a folder that is named after everything it depends on.

    Args:
        fault: a file of csrc/, a text in it and what stands there instead.
    """
    import pybind11

    sources = {p.name: p.read_text() for p in sorted((ROOT / "csrc").iterdir())}
    if fault:
        name, old, new = fault
        assert old in sources[name], f"{name} has changed: {old!r}"
        sources[name] = sources[name].replace(old, new, 1)
    sources |= {p.name: p.read_text() for p in sorted(SHIM.iterdir())}
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    compiler = shutil.which("g++")
    assert compiler, "needs g++"
    command = [
        compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing",
        "-ffp-contract=off", "-w", "-DMOLLM_WITH_CUDA=1", "-DMOLLM_ISA=baseline",
        *flags, *(f"-I{i}" for i in (".", *includes)),
    ]  # fmt: skip
    key = hashlib.sha256(repr((sorted(sources.items()), command)).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulated-cuda" / key
    folder.mkdir(parents=True, exist_ok=True)
    extension = folder / "_C.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if extension.exists():
            return extension
        number = itertools.count()
        for name, text in sources.items():
            cuda = name.endswith((".cu", ".cuh"))
            (folder / name).write_text(translated(text, number) if cuda else text)
        units = [name for name in sources if name.endswith((".cu", ".cpp"))]

        def compile_unit(name: str) -> None:
            _run([*command, "-x", "c++", "-c", name, "-o", f"{name}.o"], folder)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_unit, sorted(units, key=lambda n: len(sources[n]), reverse=True)))
        objects = [f"{name}.o" for name in units]
        _run([*command, "-shared", *objects, "-o", "linked.so", "-lpthread"], folder)
        (folder / "linked.so").rename(extension)
    return extension


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emulated_{path.parent.name}._C", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_order(path: Path, number: int, seed: int = 1) -> None:
    """How blocks and threads take turns from now on: one of `ORDERS`."""
    order, resident, chance = ORDERS[number]
    call = ctypes.CDLL(str(path)).emulator_order
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_uint64]
    call.restype = None
    call(order, resident, chance, seed)


@contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """The kernels of `module` serve the tensors of the CPU, by way of `mollm_ops._cuda`."""
    _cuda, _plain, dual_space, gram, update = (
        import_module(f"mollm_ops.{name}")
        for name in ("_cuda", "_plain", "dual_space", "gram", "update")
    )
    cuda = {
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: False,
    }
    with ExitStack() as stack:
        for place, names in (
            (_cuda, {"extension": module}),
            (_plain, {"eager": lambda: False}),
            (torch.cuda, cuda),
            (torch.Tensor, {"pin_memory": lambda t: t}),
            (gram, {"_gram_cpu": _gram, "_combine_cpu": _cuda.combine, "MAX_ROWS": 8}),
            (update, {"_update_cpu": _update, "MAX_ROWS": 9}),
            (dual_space, {"_on_device": lambda matrix: len(matrix) <= 8}),
        ):
            stack.enter_context(mock.patch.multiple(place, **names))
        yield


def _gram(rows, lists, moving=None, metric=None):
    from mollm_ops import _cuda

    counts = [_count(rows[n :: len(rows) // lists]) for n in range(len(rows) // lists)]
    if moving is None and metric is None:
        return _cuda.gram(rows, counts, lists)
    means = None if moving is None else [t for row in moving.means for t in row]
    moments = None
    if metric is not None:
        second = [t if n else None for n, t in zip(counts, metric.exp_avg_sqs, strict=True)]
        moments = _cuda.Moments(second, metric.steps, metric.weights, metric.beta2, metric.eps)
    return _cuda.gram_moved(rows, counts, lists, means, moving.beta if moving else 0.0, moments)


def _count(tensors):
    return next((t.numel() for t in tensors if t is not None), 0)


def _update(rows, weights, targets, method, moving, rounding_seed, track):
    from mollm_ops import _cuda
    from mollm_ops.update import _options

    return _cuda.update(
        rows,
        weights,
        targets,
        _options(method, rounding_seed),
        lr=None,
        second_weights=getattr(method, "second_weights", None),
        means=None if moving is None else [t for row in moving.means for t in row],
        beta=0.0 if moving is None else moving.beta,
        proceed=None,
        track=track,
    )


def main() -> None:
    """`python emulated_cuda.py TESTS...`: the tests of the CPU, with the kernels behind them."""
    import sys

    import pytest

    path = build()
    set_order(path, 2)
    with emulated(load(path)):
        sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    main()
