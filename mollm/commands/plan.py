"""`mollm plan`: the memory of a training step, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import add_renamed
from mollm.errors import UsageError
from mollm.models.four_bits import NF4
from mollm.planning import shapes
from mollm.planning.settings import (
    BYTES,
    DEVICES,
    GIB,
    GRADIENT_MEMORIES,
    METRICS,
    OPTIMIZERS,
    PER_OBJECTIVE,
    REFERENCES,
    SETTING_NAMES,
    PlanSettings,
)

if TYPE_CHECKING:
    from mollm.planning.memory import MemoryPlan
    from mollm.planning.proposals import Proposal
    from mollm.planning.shapes import Shape

_NO_FIT = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "plan",
        help="predict the memory of training, and say what would make it fit",
        description=(
            "Predicts the peak memory of an unlearning step from a model's configuration, by "
            "component and by stage of the step, without loading weights. Where it does not fit, "
            "proposes what would. The exit status is 0 where it fits, or no memory is known to "
            "compare with, and 1 where it does not."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    _add_training(parser)
    _add_memory(parser)
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
        "--shape",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"a known shape in place of a model: {', '.join(shapes.NAMED_SHAPES)}",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    default = PlanSettings()
    parser.add_argument(
        "--per-device-train-batch-size",
        dest="batch_size",
        type=int,
        default=default.batch_size,
        help="examples per micro-batch of each set",
    )
    add_renamed(parser, "--batch-size", "--per-device-train-batch-size")
    parser.add_argument(
        "--max-length",
        dest="sequence_length",
        type=int,
        default=default.sequence_length,
        help="tokens per example",
    )
    add_renamed(parser, "--sequence-length", "--max-length")
    parser.add_argument(
        "--gradient-accumulation-steps",
        dest="accumulation",
        type=int,
        default=default.accumulation,
        help="micro-batches per step",
    )
    add_renamed(parser, "--accumulation", "--gradient-accumulation-steps")
    parser.add_argument("--dtype", choices=BYTES, default=default.dtype, help="weight dtype")
    parser.add_argument(
        "--compute-dtype",
        choices=BYTES,
        default=argparse.SUPPRESS,
        help="dtype of matrix products (default: bfloat16 if the device has instructions for it)",
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="base optimizer"
    )
    parser.add_argument(
        "--state-dtype",
        choices=BYTES,
        default=argparse.SUPPRESS,
        help="optimizer-state dtype (default: that of the trainable parameters)",
    )
    parser.add_argument(
        "--momentum",
        choices=(PER_OBJECTIVE,),
        default=argparse.SUPPRESS,
        help="an EMA of each objective's gradient in place of the base's momentum",
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default=default.metric,
        help="metric of the Gram matrix; euclidean gives AdamW a first moment",
    )
    parser.add_argument(
        "--gradient-memory",
        choices=GRADIENT_MEMORIES,
        default=default.gradient_memory,
        help="how the objectives' gradients are kept until the step",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCES,
        default=default.reference,
        help="reference model: a frozen copy, the model with its adapter disabled, or a cache of "
        "its final hidden states on disk",
    )
    parser.add_argument(
        "--lora",
        dest="lora_rank",
        type=int,
        default=default.lora_rank,
        metavar="RANK",
        help="rank of LoRA on all linear layers of the decoder; 0 for full training",
    )
    add_renamed(parser, "--lora-rank", "--lora")
    parser.add_argument(
        "--quantization",
        choices=(NF4,),
        default=argparse.SUPPRESS,
        help="keep the decoder's linear layers in 4 bits (needs --lora)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute each layer's activations in backward",
    )
    parser.add_argument(
        "--freeze-embeddings",
        action="store_true",
        help="do not train token embeddings and head",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=argparse.SUPPRESS,
        help="device to train on (default: cuda if there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        default=argparse.SUPPRESS,
        metavar="GIB",
        help="device memory in GiB (default: what is available on this machine)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from mollm.planning.memory import plan
    from mollm.system.precision import compute_dtype

    given = vars(arguments)
    if not given.get("device_memory", 1) > 0:
        raise UsageError(f"device_memory must be positive, but got {arguments.device_memory}.")
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    settings = PlanSettings(
        **{
            "compute_dtype": compute_dtype(torch.device("cpu")).name
            if device == "cpu"
            else "bfloat16"
        }
        | {name: given[name] for name in SETTING_NAMES if name in given}
        | {"device": device}
    )
    memory = given["device_memory"] * GIB if "device_memory" in given else _found_memory(device)
    first = plan(_shape(given), settings)
    if arguments.json:
        print(json.dumps(as_dict(first, memory), indent=1))
    else:
        print(table(first))
        print(verdict(first, memory))
    return 0 if memory is None or first.fits(memory) else _NO_FIT


def _shape(given: dict[str, str]) -> Shape:
    from mollm.models import loading

    if "shape" in given:
        return shapes.shape_named(given["shape"])
    return shapes.shape_of(*loading.load_config(given["model"]))


def _found_memory(device: str) -> float | None:
    """Bytes that are available on this machine's device; None where they are not known."""
    import torch

    from mollm.system import machine

    if device == "cuda" and not torch.cuda.is_available():
        return None
    memory = machine.available_memory_gb(torch.device(device)) * machine.GB
    return memory if memory < float("inf") else None


def as_dict(plan: MemoryPlan, memory: float | None) -> dict[str, Any]:
    """The plan in bytes, by stage and component, and what would make it fit."""
    from mollm.planning.proposals import proposals

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
        f"trainable; {settings.batch_size} x {settings.sequence_length} tokens on "
        f"{settings.device}.",
        "",
        f"{'component, GiB':<32}{'at the peak':>14}{'at most':>14}",
        *(
            f"{name:<32}{_gib(peak.parts.get(name, 0)):>14}{_gib(plan.component(name)):>14}"
            for name in names
        ),
        "",
        "stage, GiB",
        *(
            f"{stage.name:<32}{_gib(stage.total):>14}{'   <- peak' if stage is peak else ''}"
            for stage in plan.stages
        ),
    ]
    if plan.host_bytes:
        rows += ["", f"Pinned host memory for gradients: {_gib(plan.host_bytes)} GiB."]
    if plan.cache_bytes_per_token:
        size = plan.cache_bytes_per_token
        rows += ["", f"Cached states on disk: {size:,} bytes for each token of the retain data."]
    return "\n".join(rows)


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
        rows += [_row(proposal) for proposal in found]
    last = found[-1].plan if found else plan
    if last.fits(memory):
        rows += [f"With these it fits, with {_gib(memory - last.peak.total)} GiB to spare."]
    else:
        rows += [f"Still {_gib(last.peak.total - memory)} GiB short: use a smaller model, shorter "
                 "sequences or a larger device."]  # fmt: skip
    return "\n".join(rows)


def _row(proposal: Proposal) -> str:
    peak = _gib(proposal.plan.peak.total)
    return f"  {proposal.words:<40} saves {_gib(proposal.saves):>8}, peak {peak:>8}"


def _gib(size: float) -> str:
    """Three digits at least, also of a small model."""
    value = size / GIB
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
