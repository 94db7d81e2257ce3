"""`mollm init`: a settings file for a model and its data."""

from __future__ import annotations

import argparse
from pathlib import Path

from mollm.commands.arguments import data_of
from mollm.errors import UsageError
from mollm.planning.settings import DEVICES
from mollm.system.parsing import user_path
from mollm.system.units import GIB


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "init",
        help="write a settings file for a model and its data",
        description=(
            "Reads the data as a run would, plans the memory of a step, and writes a settings file "
            "with a comment to each line: rows and lengths that fit, a learning rate and a number "
            "of steps to begin with."
        ),
    )
    for name, what in (
        ("model", "model to unlearn from: folder, .gguf file or hub name"),
        ("forget", "examples to forget"),
        ("retain", "examples to retain"),
    ):
        parser.add_argument(f"--{name}", required=True, metavar="PATH_OR_HUB_NAME", help=what)
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train a LoRA adapter of this rank"
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="device memory in GiB (default: what is available on this machine)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="runs/unlearn", help="what the file names as out"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "file", nargs="?", type=user_path, default=Path("run.yaml"), metavar="RUN.yaml"
    )
    parser.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    import torch

    from mollm.data.sets import role_of
    from mollm.evaluation.preview import preview
    from mollm.models import loading
    from mollm.planning.first_settings import first_settings, written
    from mollm.planning.settings import PlanSettings
    from mollm.planning.shapes import shape_of
    from mollm.system import machine
    from mollm.system.folders import check_new_file, replace_text
    from mollm.system.precision import compute_dtype

    path: Path = arguments.file
    check_new_file(path)
    if path.exists() and not arguments.force:
        raise UsageError(
            f"{path} must be a new file, but it is there: name another one, or give --force."
        )
    if arguments.device_memory is not None and not arguments.device_memory > 0:
        raise UsageError(f"device_memory must be positive, but got {arguments.device_memory}.")
    data = {name: data_of(getattr(arguments, name)) for name in ("model", "forget", "retain")}
    found = preview(data["model"], data["forget"], data["retain"], max_length=1 << 20, rows=0)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    memory = None if arguments.device_memory is None else arguments.device_memory * GIB
    if memory is None and (device == "cpu" or torch.cuda.is_available()):
        memory = machine.available_memory(torch.device(device))
        memory = None if memory == float("inf") else memory
    on_cpu = compute_dtype(torch.device("cpu")).name
    settings = PlanSettings(
        device=device,
        compute_dtype=on_cpu if device == "cpu" else "bfloat16",
        lora_rank=arguments.lora,
        reference="adapter" if arguments.lora else "copy",
        sequence_length=found.max_length,
    )
    sets = found.sets
    first = first_settings(
        shape_of(*loading.load_config(data["model"])),
        settings,
        memory,
        longest=max(each.tokens[2] for each in sets.values()),
        forget_rows=max(each.rows for name, each in sets.items() if role_of(name) == "forget"),
    )
    facts = "; ".join(
        f"{name}: {each.rows} rows of {each.tokens[0]} to {each.tokens[2]} tokens"
        for name, each in sets.items()
    )
    own = {**data, "out": arguments.out}
    if arguments.device is not None:
        own["device"] = arguments.device
    replace_text(path, written(own, first, facts))
    print(f"Settings: {path}")
    print(f"Next: mollm preview --config {path}   and   mollm unlearn --config {path}")
    return 0
