"""`mollm plan`: the memory of a training step, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mollm.commands import plan_cluster
from mollm.commands.arguments import add_renamed
from mollm.errors import UsageError
from mollm.planning import shapes
from mollm.planning.settings import OPTIONS, PlanSettings
from mollm.system.options import add_options
from mollm.system.tables import aligned
from mollm.system.units import GIB

if TYPE_CHECKING:
    from mollm.planning.memory import MemoryPlan
    from mollm.planning.proposals import Proposal
    from mollm.planning.shapes import Shape

_NO_FIT = 1
_RENAMED = {
    "--batch-size": "--per-device-train-batch-size",
    "--sequence-length": "--max-length",
    "--accumulation": "--gradient-accumulation-steps",
    "--lora-rank": "--lora",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "plan",
        help="predict the memory of training, and say what would make it fit",
        description=(
            "Predicts the peak memory of an unlearning step from a model's configuration, by "
            "component and by stage of the step, without loading weights. Where it does not fit, "
            "proposes what would. With --gpus, predicts a step on a cluster: memory, FLOPs, bytes "
            "on each link and time, and prints what starts it. The exit status is 0 where it fits, "
            "or no memory is known to compare with, and 1 where it does not."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    _add_training(parser)
    _add_memory(parser)
    plan_cluster.add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    parser.set_defaults(run=_plan)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="PATH_OR_CONFIG",
        help="a model folder, a config.json, a .gguf file or a hub name",
    )
    model.add_argument(
        "--preset",
        "--shape",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"a known shape in place of a model: {', '.join(shapes.NAMED_SHAPES)}",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    add_options(parser, PlanSettings)
    for old, new in _RENAMED.items():
        add_renamed(parser, old, new)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-memory",
        type=float,
        default=argparse.SUPPRESS,
        metavar="GIB",
        help="device memory in GiB (default: what is available on this machine, or what the GPU of "
        "a cluster has)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from mollm.planning.memory import plan
    from mollm.system.precision import compute_dtype

    given = vars(arguments)
    if not given.get("device_memory", 1) > 0:
        raise UsageError(f"device_memory must be positive, but got {arguments.device_memory}.")
    if "gpus" in given:
        return _plan_cluster(given)
    plan_cluster.refuse_without_gpus(given)
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    settings = PlanSettings(
        **{
            "compute_dtype": compute_dtype(torch.device("cpu")).name
            if device == "cpu"
            else "bfloat16"
        }
        | {name: given[name] for name in OPTIONS if name in given}
        | {"device": device}
    )
    memory = given["device_memory"] * GIB if "device_memory" in given else _found_memory(device)
    first = plan(_shape(given), settings)
    if arguments.json:
        print(json.dumps(as_dict(first, memory), indent=1))
    else:
        print(table(first))
        print(verdict(first, memory))
        print(evaluation(first, memory))
    return 0 if memory is None or first.fits(memory) else _NO_FIT


def _plan_cluster(given: dict[str, Any]) -> int:
    from mollm.planning import cluster as clusters

    cluster = plan_cluster.cluster_of(given)
    if given.get("device", "cuda") != "cuda":
        raise UsageError(f"device must be cuda with --gpus, but got {given['device']}.")
    settings = PlanSettings(**{name: given[name] for name in OPTIONS if name in given})
    memory = given.get("device_memory", cluster.gpu.memory) * GIB
    found = clusters.plan_cluster(
        _shape(given), settings, cluster, memory=memory, layout=given.get("fsdp")
    )
    if given["json"]:
        print(json.dumps(plan_cluster.as_dict(found), indent=1))
    else:
        print(plan_cluster.table(found), plan_cluster.verdict(found), sep="\n\n")
        print(f"\n{plan_cluster.starting(found)}", end="")
    return 0 if found.fits else _NO_FIT


def _shape(given: dict[str, str]) -> Shape:
    from mollm.models import loading

    if "preset" in given:
        return shapes.shape_named(given["preset"])
    return shapes.shape_of(*loading.load_config(given["model"]))


def _found_memory(device: str) -> float | None:
    """Bytes that are available on this machine's device; None where they are not known."""
    import torch

    from mollm.system import machine

    if device == "cuda" and not torch.cuda.is_available():
        return None
    memory = machine.available_memory(torch.device(device))
    return memory if memory < float("inf") else None


def as_dict(plan: MemoryPlan, memory: float | None) -> dict[str, Any]:
    """The plan in bytes, by stage and component, and what would make it fit."""
    from mollm.planning.evaluation import plan_evaluation
    from mollm.planning.proposals import proposals

    measured = plan_evaluation(plan.shape, plan.settings)
    fits = None if memory is None else plan.fits(memory)
    found = proposals(plan, memory) if memory is not None and not fits else []
    return {
        "model": plan.shape.label,
        "parameters": plan.shape.parameters,
        "trainable": plan.trainable,
        "settings": asdict(plan.settings),
        "stages": {stage.name: dict(stage.parts) for stage in plan.stages},
        "peak": {"stage": plan.peak.name, "bytes": plan.peak.total},
        "host_bytes": plan.host_bytes,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
        "evaluation": {stage.name: dict(stage.parts) for stage in measured.stages},
        "memory": memory,
        "fits": fits,
        "proposals": [
            {"change": each.words, "peak_bytes": each.plan.peak.total, "saves_bytes": each.saves}
            for each in found
        ],
    }


# ---- words


def table(plan: MemoryPlan) -> str:
    """The plan by component and by stage, in GiB."""
    peak, settings = plan.peak, plan.settings
    names = dict.fromkeys(name for stage in plan.stages for name in stage.parts)
    rows = [
        f"{plan.shape.label}: {plan.shape.parameters:,} parameters, {plan.trainable:,} of them "
        f"trainable; {_batches(settings)} x {settings.sequence_length} tokens on "
        f"{settings.device}.",
        "",
        *aligned(
            [
                ("component, GiB", "at the peak", "at most"),
                *((n, _gib(peak.parts.get(n, 0)), _gib(plan.component(n))) for n in names),
            ]
        ),
        "",
        *aligned(
            [
                ("stage, GiB", ""),
                *((s.name, _gib(s.total), "<- peak" * (s is peak)) for s in plan.stages),
            ]
        ),
    ]
    if plan.host_bytes:
        rows += ["", f"Pinned host memory for gradients: {_gib(plan.host_bytes)} GiB."]
    if plan.cache_bytes_per_token:
        size = plan.cache_bytes_per_token
        rows += ["", f"Cached states on disk: {size:,} bytes for each token of the retain data."]
    return "\n".join(rows)


def _batches(settings: PlanSettings) -> str:
    """How many rows go together, of either set where these differ."""
    forget, retain = settings.batch_size, settings.of_retain_batch.batch_size
    return str(forget) if retain == forget else f"{forget} and {retain}"


def verdict(plan: MemoryPlan, memory: float | None) -> str:
    """Whether it fits, and else what would make it fit."""
    from mollm.planning.proposals import proposals

    peak = f"\nThe peak is {_gib(plan.peak.total)} GiB, in the stage {plan.peak.name!r}."
    if memory is None:
        return f"{peak} Name the device's memory with --device-memory to see whether that fits."
    if plan.fits(memory):
        spare = _gib(memory - plan.peak.total)
        return f"{peak} It fits into {_gib(memory)} GiB with {spare} GiB to spare."
    found = proposals(plan, memory)
    rows = [f"{peak} It does not fit into {_gib(memory)} GiB."]
    if found:
        rows += ["", "What saves memory, each on top of those before it:"]
        rows += [f"  {line}" for line in aligned(map(_cells, found))]
    last = found[-1].plan if found else plan
    if last.fits(memory):
        rows += [f"With these it fits, with {_gib(memory - last.peak.total)} GiB to spare."]
    else:
        rows += [f"Still {_gib(last.peak.total - memory)} GiB short: use a smaller model, shorter "
                 "sequences or a larger device."]  # fmt: skip
    return "\n".join(rows)


def evaluation(plan: MemoryPlan, memory: float | None) -> str:
    """What `mollm evaluate` takes, in a sentence or two."""
    from mollm.planning.evaluation import BATCH_SIZE, REPLY, plan_evaluation

    settings = plan.settings
    peak = plan_evaluation(plan.shape, settings).peak
    told = (
        f"`mollm evaluate` takes {_gib(peak.total)} GiB with the original beside the model in "
        f"{settings.dtype}, {BATCH_SIZE} x {settings.sequence_length} tokens and replies of "
        f"{REPLY}, without judges."
    )
    if memory is None or peak.total <= memory:
        return told
    return (
        f"{told} That does not fit: give it a smaller --batch-size, --dtype bfloat16 or "
        "--original none."
    )


def _cells(proposal: Proposal) -> tuple[str, str, str]:
    return (
        proposal.words,
        f"saves {_gib(proposal.saves)}",
        f"peak {_gib(proposal.plan.peak.total)}",
    )


def _gib(size: float) -> str:
    """Three digits at least, also of a small model."""
    value = size / GIB
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
