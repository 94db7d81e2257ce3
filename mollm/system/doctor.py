"""`mollm doctor`: what is installed, what runs where, and whether it computes the right thing."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mollm.system import machine
from mollm.system.precision import compute_dtype
from mollm.system.units import GIB
from mollm_ops import (
    _extension,
    combine,
    dual_space_weights,
    gram,
    gram_moved,
    linear_ce_kl,
    linear_uce_loss,
    rows,
)
from mollm_ops.operands import AdamMetric, AdamWStep, RunningMeans, Targets
from mollm_ops.reference import dual_space as dual_space_reference
from mollm_ops.reference.gram import combine_reference, gram_moved_reference, gram_reference
from mollm_ops.reference.losses import linear_ce_kl_reference, linear_uce_loss_reference
from mollm_ops.reference.update import update_reference
from mollm_ops.update import update_

_PACKAGES = ("triton", "accelerate", "peft", "bitsandbytes", "datasets")
_CAPABILITY = (8, 0)
_REINSTALL = "install a C++ compiler and run pip install again"


@dataclass(frozen=True)
class Device:
    """A device of this machine."""

    device: str
    """As Torch calls it."""
    name: str
    details: dict[str, str]
    """Instruction set and threads, or compute capability."""
    memory_gib: float | None
    """Available, in GiB; None where unknown."""


@dataclass(frozen=True)
class Kernel:
    """A group of kernels on a device that they are made for."""

    name: str
    device: str
    inactive_reason: str | None
    """Why they are not in use; None where they are."""


@dataclass(frozen=True)
class Check:
    """One self-test on one device."""

    name: str
    device: str
    error: str | None
    """What went wrong; None where the result is that of float64."""


@dataclass(frozen=True)
class Disk:
    """Free space where results or temporary files go."""

    folder: str
    free_gib: float
    """In GiB."""


@dataclass(frozen=True)
class Diagnosis:
    """What `mollm doctor` found."""

    versions: dict[str, str]
    """Of Python and of the packages; "not installed" where one is missing."""
    devices: list[Device]
    kernels: list[Kernel]
    checks: list[Check]
    disks: list[Disk]

    @property
    def ok(self) -> bool:
        """Whether every kernel made for this machine is in use and every self-test passed."""
        inactive = any(kernel.inactive_reason for kernel in self.kernels)
        return not inactive and not any(check.error for check in self.checks)


def diagnose() -> Diagnosis:
    """Looks at this machine; takes about a second."""
    devices = _devices()
    return Diagnosis(
        versions=_versions(),
        devices=devices,
        kernels=[kernel for device in devices for kernel in _kernels(torch.device(device.device))],
        checks=[check for device in devices for check in _checks(torch.device(device.device))],
        disks=[_disk(Path.cwd()), _disk(Path(tempfile.gettempdir()))],
    )


# ---- what there is


def _versions() -> dict[str, str]:
    found = machine.versions(*_PACKAGES)
    return found | {name: "not installed" for name in _PACKAGES if name not in found}


def _devices() -> list[Device]:
    extension = _extension.extension
    instructions = "unknown" if extension is None else extension.cpu_instruction_set()
    cpu = torch.device("cpu")
    details = {
        "instruction set": instructions,
        "threads": str(torch.get_num_threads()),
        "computes in": _computes_in(cpu),
    }
    found = [Device("cpu", machine.device_name(cpu), details, _memory(cpu))]
    for index in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(gpu)
        details = {"compute capability": f"{major}.{minor}", "computes in": _computes_in(gpu)}
        found.append(Device(str(gpu), machine.device_name(gpu), details, _memory(gpu)))
    return found


def _computes_in(device: torch.device) -> str:
    computes = compute_dtype(device)
    return f"{computes.name} ({computes.reason})"


def _memory(device: torch.device) -> float | None:
    available = machine.available_memory(device)
    return round(available / GIB, 1) if available < float("inf") else None


def _disk(folder: Path) -> Disk:
    return Disk(str(folder), round(shutil.disk_usage(folder).free / GIB, 1))


# ---- which kernels are in use


def _kernels(device: torch.device) -> Iterator[Kernel]:
    if device.type == "cpu":
        why = _no_extension()
        yield Kernel("Gram matrix, solver and update in C++", "cpu", why)
        yield Kernel("rows of the losses in C++", "cpu", why)
        return
    yield Kernel("Gram matrix and solver in CUDA", str(device), _no_cuda(device))
    yield Kernel("rows of the losses in Triton", str(device), _no_triton())


def _no_extension() -> str | None:
    if _extension.extension is None:
        return f"the compiled extension is missing: {_REINSTALL}"
    return None


def _no_cuda(device: torch.device) -> str | None:
    extension = _extension.extension
    if extension is None:
        return _no_extension()
    if not extension.HAS_CUDA:
        return "the extension was built without CUDA: install nvcc and run pip install again"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"compute capability must be at least 8.0, but is {capability[0]}.{capability[1]}"
    return None


def _no_triton() -> str | None:
    if not rows.HAS_TRITON:
        return "Triton is missing: pip install triton"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "they run in Triton's interpreter: unset TRITON_INTERPRET"
    return None


# ---- whether they compute the right thing


def _checks(device: torch.device) -> Iterator[Check]:
    for name, (error_of, tolerance) in SELF_TESTS.items():
        yield Check(name, str(device), _verdict(error_of, tolerance, device))


def _verdict(
    error_of: Callable[[torch.device], float], tolerance: float, device: torch.device
) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fall-back, which is told about elsewhere
            error = error_of(device)
    except Exception as raised:  # whatever goes wrong on a machine is what the user came for
        return " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
    if error <= tolerance:
        return None
    return f"the relative error must be at most {tolerance:g}, but is {error:.2g}"


def _random(*shape: int) -> Tensor:
    """float32 on the CPU; the same numbers in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; infinite where a result is not finite."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    error = float((found - expected).norm() / expected.norm())
    return error if error < float("inf") else float("inf")


def _gradients(device: torch.device) -> list[list[Tensor | None]]:
    """Three, of two parameters, with a gap."""
    rows_of = [[_random(67, 33 + k).narrow(1, 0, 33).contiguous(), _random(5 + k)[:5]]
               for k in range(3)]  # fmt: skip
    lists: list[list[Tensor | None]] = [[t.to(device) for t in row] for row in rows_of]
    lists[1][1] = None
    return lists


def _gram_error(device: torch.device) -> float:
    lists = _gradients(device)
    return _distance(gram(lists), gram_reference(lists))


def _metric_gram_error(device: torch.device) -> float:
    results = []
    for to, matrix in ((device, gram_moved), (torch.device("cpu"), gram_moved_reference)):
        lists = _gradients(to)
        means = [[None if t is None else torch.zeros_like(t) for t in row] for row in lists]
        steps = [torch.ones((), device=to) for _ in lists[0]]
        second = [_random(67, 33).square().to(to), None]
        weights = torch.full((len(lists),), 1 / 3, dtype=torch.float64, device=to)
        metric = AdamMetric(second, steps, weights)
        for moving in (None, RunningMeans(means, 0.9)):
            results.append(matrix(lists, moving, metric).cpu())
    return max(_distance(results[0], results[2]), _distance(results[1], results[3]))


def _combine_error(device: torch.device) -> float:
    lists, weights = _gradients(device), torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    pairs = zip(
        combine(lists, weights.to(device)), combine_reference(lists, weights.to(device)),
        strict=True,
    )  # fmt: skip
    return max(_distance(a, b) for a, b in pairs if a is not None and b is not None)


def _solver_error(device: torch.device) -> float:
    G = gram_reference(_gradients(torch.device("cpu")))
    c = dual_space_reference.as_array([1.0] * len(G))
    expected = dual_space_reference.solve(G.numpy(), "dual", c, normalize=False, length="mean")
    found = dual_space_weights(G.to(device)).weights
    return _distance(found, torch.from_numpy(expected.weights))


def _update_error(device: torch.device) -> float:
    weights = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    results = []
    for to, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        lists = [[None if t is None else t.to(dtype) for t in row] for row in _gradients(to)]
        params = [_random(67, 33).to(to, dtype), _random(5).to(to, dtype)]
        first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        steps = [torch.ones((), device=to) for _ in params]
        step = update_ if to == device and dtype == torch.float32 else update_reference
        step(lists, weights.to(to), Targets(params, first, second, steps), AdamWStep(lr=0.1))
        results.append(torch.cat([p.cpu().double().flatten() for p in params]))
    return _distance(*results)


def _loss_error(
    device: torch.device,
    loss: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *others: Tensor,
) -> float:
    """The largest error of loss, dH and dW, with 23 rows and a vocabulary of 1027."""
    results = []
    for of, to, dtype in ((loss, device, torch.float32), (reference, "cpu", torch.float64)):
        hidden, weight = (
            x.to(to, dtype).requires_grad_() for x in (_random(23, 32), _random(1027, 32) / 4)
        )
        rest = [x.to(to, dtype if x.is_floating_point() else x.dtype) for x in others]
        value = of(hidden, weight, *rest)
        results.append((value, *torch.autograd.grad(value, (hidden, weight))))
    return max(_distance(*pair) for pair in zip(*results, strict=True))


def _targets() -> Tensor:
    return torch.arange(23) * 44  # the first and, with 22 · 44 = 968, nearly the last of 1027


def _uce_error(device: torch.device) -> float:
    return _loss_error(device, linear_uce_loss, linear_uce_loss_reference, _targets())


def _ce_kl_error(device: torch.device) -> float:
    def both(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *tensors: torch.stack(function(*tensors)).sum()

    original = _random(23, 32) + _random(32) / 8
    ce_kl, reference = both(linear_ce_kl), both(linear_ce_kl_reference)
    return _loss_error(device, ce_kl, reference, _targets(), original)


SELF_TESTS: dict[str, tuple[Callable[[torch.device], float], float]] = {
    "Gram matrix": (_gram_error, 1e-6),
    "Gram matrix in Adam's metric": (_metric_gram_error, 1e-6),
    "weighted sum": (_combine_error, 1e-6),
    "solver": (_solver_error, 1e-9),
    "update": (_update_error, 1e-5),
    "UCE": (_uce_error, 1e-4),
    "CE and KL": (_ce_kl_error, 1e-4),
}
"""Relative error on a device against float64, and the largest that is right."""


# ---- the command
