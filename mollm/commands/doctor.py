"""`mollm doctor`: versions, devices, kernels and a self-test."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from mollm.system.tables import aligned

if TYPE_CHECKING:
    from mollm.system.doctor import Diagnosis


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, which kernels are in use, and whether they work",
        description=(
            "Prints versions, devices, which kernels are in use and why others are not, and runs "
            "a self-test on every device. The exit status is 0 where everything that this machine "
            "allows works, and 1 otherwise."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from mollm.system.doctor import diagnose

    found = diagnose()
    if arguments.json:
        print(json.dumps({"ok": found.ok, **asdict(found)}, indent=1))
    else:
        print(report(found))
    return 0 if found.ok else 1


def report(found: Diagnosis) -> str:
    """The diagnosis in words."""
    from mollm_ops._extension import extension

    cuda = "without" if extension is None or not extension.HAS_CUDA else "with"
    lines = ["Versions", *_columns(found.versions.items()), "", "Devices"]
    for device in found.devices:
        memory = "unknown" if device.memory_gib is None else f"{device.memory_gib} GiB"
        details = ", ".join(f"{name} {value}" for name, value in device.details.items())
        lines.append(f"  {device.device}: {device.name}; {details}; memory available {memory}")
    if len(found.devices) == 1:
        lines.append(f"  no GPU that Torch finds; the extension is built {cuda} its CUDA part")
    lines += ["", "Kernels"]
    reasons = {k: f"NOT in use: {k.inactive_reason}" for k in found.kernels if k.inactive_reason}
    lines += _columns((f"{k.name}, {k.device}", reasons.get(k, "in use")) for k in found.kernels)
    lines += ["", "Self-test against float64"]
    lines += _columns((f"{c.name}, {c.device}", c.error or "OK") for c in found.checks)
    lines += ["", "Free disk space"]
    lines += _columns((disk.folder, f"{disk.free_gib} GiB") for disk in found.disks)
    end = "Everything works." if found.ok else "Something does not work as it should, see above."
    return "\n".join([*lines, "", end])


def _columns(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {line}" for line in aligned(pairs, left=2)]
