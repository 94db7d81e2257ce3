"""`mollm plan --gpus N`: a step on several GPUs and nodes, and the lines that start the run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.planning.hardware import COPIES, GPUS, LAYOUTS, Cluster
from mollm.system.tables import aligned
from mollm.system.units import GIB

if TYPE_CHECKING:
    from mollm.planning.cluster import ClusterPlan, Prediction

_OPTIONS = ("nodes", "gpu", "network", "fsdp")
_PORT = 29500


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of several GPUs to `mollm plan`."""
    group = parser.add_argument_group("several GPUs")
    suppressed: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of a node: predicts a cluster", **suppressed
    )
    group.add_argument("--nodes", type=int, metavar="N", help="nodes (default: 1)", **suppressed)
    group.add_argument(
        "--gpu",
        choices=tuple(GPUS),
        help="whose peak figures to take (default: h100)",
        **suppressed,
    )
    group.add_argument(
        "--network",
        type=float,
        metavar="GB_PER_S",
        help="10⁹ bytes per second of each GPU's share of the network, per direction (default: "
        "that of the GPU's usual machine)",
        **suppressed,
    )
    group.add_argument(
        "--fsdp",
        choices=LAYOUTS,
        help="how the GPUs share the model (default: the fastest of those that fit)",
        **suppressed,
    )


def refuse_without_gpus(given: dict[str, Any]) -> None:
    """Refuses options of a cluster where there is none.

    Raises:
        UsageError: One is given.
    """
    for name in _OPTIONS:
        if name in given:
            raise UsageError(
                f"{name} must be left out of a plan for one device, but got {given[name]}: give "
                "--gpus too."
            )


def cluster_of(given: dict[str, Any]) -> Cluster:
    """What the flags describe.

    Raises:
        UsageError: A number is out of range.
    """
    gpu = GPUS[given.get("gpu", "h100")]
    if "network" in given:
        if not given["network"] > 0:
            raise UsageError(f"network must be positive, but got {given['network']}.")
        gpu = replace(gpu, network=given["network"])
    return Cluster(given["gpus"], given.get("nodes", 1), gpu)


def as_dict(plan: ClusterPlan) -> dict[str, Any]:
    """The plan in bytes, FLOPs and seconds, all predicted."""
    cluster = plan.cluster
    return {
        "predicted": True,
        "model": plan.chosen.memory.shape.label,
        "parameters": plan.chosen.memory.shape.parameters,
        "trainable": plan.chosen.memory.trainable,
        "settings": asdict(plan.settings),
        "cluster": {"gpus": cluster.gpus, "nodes": cluster.nodes, "gpu": asdict(cluster.gpu)},
        "memory": plan.memory,
        "layouts": [_prediction(made, plan.memory) for made in plan.predictions],
        "refused": list(plan.refused),
        "fits": plan.fits,
        "chosen": plan.chosen.label,
        "proposals": [
            {"change": each.words, "peak_bytes": each.plan.peak.total, "saves_bytes": each.saves}
            for each in plan.proposals
        ],
        "nodes_that_fit": plan.nodes_that_fit,
        "run": run_yaml(plan),
        "torchrun": torchrun_line(plan),
        "slurm": slurm_script(plan),
    }


def _prediction(made: Prediction, memory: float) -> dict[str, Any]:
    return {
        "layout": made.label,
        "peak": {"stage": made.memory.peak.name, "bytes": made.memory.peak.total},
        "stages": {stage.name: dict(stage.parts) for stage in made.memory.stages},
        "fits": made.memory.fits(memory),
        "flops_per_gpu": made.flops,
        "sent_bytes_per_gpu": made.sent,
        "bytes_out_of_a_node": made.left_node,
        "collectives": [asdict(each) for each in made.traffic],
        "compute_seconds": made.compute_seconds,
        "link_seconds": made.link_seconds,
        "least_step_seconds": made.seconds,
    }


# ---- words


def table(plan: ClusterPlan) -> str:
    """The ways to share a step, one a line."""
    cluster, gpu = plan.cluster, plan.cluster.gpu
    narrow = plan.settings.compute_dtype == "bfloat16"
    cells = [("", "memory", "", "FLOPs", "GPU", "node", "compute", "links", "step")]
    cells += [("", "GiB", "", "10^12", "GB out", "GB out", "s", "s", "s")]
    for made in plan.predictions:
        cells.append(
            (
                made.label,
                _figure(made.memory.peak.total / GIB),
                "fits" if made.memory.fits(plan.memory) else "no",
                _figure(made.flops / 1e12),
                _figure(made.sent / 1e9),
                _figure(made.left_node / 1e9),
                _figure(made.compute_seconds),
                _figure(made.link_seconds),
                _figure(made.seconds),
            )
        )
    settings = plan.settings
    many = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus}"
    tflops = gpu.tflops if narrow else gpu.tflops_float32
    shape = plan.chosen.memory.shape
    return "\n".join(
        [
            f"{shape.label}: {shape.parameters:,} parameters, "
            f"{plan.chosen.memory.trainable:,} of them trainable;",
            f"{settings.batch_size} x {settings.sequence_length} tokens of each set on each GPU, "
            f"{many} {gpu.name} with {_figure(plan.memory / GIB)} GiB.",
            "",
            *aligned(cells),
            "",
            "Predicted, not measured, for a step: memory and FLOPs of a GPU, what a GPU sends",
            "and what leaves a node, and the least that these take at peak figures:",
            f"{tflops:g} TFLOP/s, and for each GPU {gpu.link:g} GB/s within a node and "
            f"{gpu.network:g} GB/s between nodes.",
            "A real step takes longer.",
        ]
    )


def verdict(plan: ClusterPlan) -> str:
    """Which one to take, or what would make it fit."""
    label = plan.chosen.label
    peak, memory = plan.chosen.memory.peak, plan.memory
    rows = list(plan.refused)
    if plan.fits:
        rows.append(
            f"{label} fits: its peak is {_gib(peak.total)} GiB, in the stage {peak.name!r};\n"
            f"{_gib(memory - peak.total)} GiB are to spare."
        )
        return "\n".join(rows)
    found = plan.proposals
    rows.append(
        f"Nothing fits into {_gib(memory)} GiB. {label} takes {_gib(peak.total)} GiB, in the "
        f"stage\n{peak.name!r}."
    )
    if found:
        cells = [
            (each.words, f"saves {_gib(each.saves)}", f"peak {_gib(each.plan.peak.total)}")
            for each in found
        ]
        rows += [f"What saves memory with {label}, each on top of those before it:"]
        rows += [f"  {line}" for line in aligned(cells)]
    last = found[-1].plan if found else plan.chosen.memory
    if last.fits(memory):
        rows.append(f"With these it fits, with {_gib(memory - last.peak.total)} GiB to spare.")
    else:
        rows.append(f"Still {_gib(last.peak.total - memory)} GiB short.")
    nodes = plan.nodes_that_fit
    if nodes is not None:
        rows.append(f"As it is, it fits on {nodes} such nodes with full_shard.")
    elif not last.fits(memory):
        rows.append("Use a smaller model, shorter sequences or GPUs with more memory.")
    return "\n".join(rows)


def run_yaml(plan: ClusterPlan) -> str:
    """The settings of the run that is planned."""
    from mollm.planning.first_settings import run_settings

    own: dict[str, Any] = run_settings(plan.planned.settings)
    if plan.chosen.layout != COPIES:
        own["fsdp"] = plan.chosen.layout
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in own.items()) + "\n"


def torchrun_line(plan: ClusterPlan) -> str:
    """What starts the run by hand: on one node, or on each of them."""
    gpus, nodes = plan.cluster.gpus, plan.cluster.nodes
    where = "--standalone"
    if nodes > 1:
        meeting = f"--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:{_PORT}"
        where = f"--nnodes {nodes} {meeting} \\\n   "
    return f"torchrun {where} --nproc-per-node {gpus} -m mollm unlearn --config run.yaml"


def slurm_script(plan: ClusterPlan) -> str:
    """A batch script for Slurm; where the job is run again, so is the run from its checkpoint."""
    gpus, nodes = plan.cluster.gpus, plan.cluster.nodes
    return f"""\
#!/bin/bash
#SBATCH --job-name=mollm
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --requeue
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes {nodes} --nproc-per-node {gpus} \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
    --rdzv-endpoint "$first:{_PORT}" \\
    -m mollm unlearn --config run.yaml --resume
"""


def starting(plan: ClusterPlan) -> str:
    """The settings, the line of torchrun and the Slurm script, to be copied."""
    where = "on each node" if plan.cluster.nodes > 1 else "on the node"
    data = "and model, forget, retain and out"
    return (
        f"---- run.yaml: these, {data}\n{run_yaml(plan)}\n"
        f"---- {where}\n{torchrun_line(plan)}\n\n"
        f"---- or with Slurm: sbatch mollm.sbatch\n{slurm_script(plan)}"
    )


def _gib(size: float) -> str:
    return _figure(size / GIB)


def _figure(value: float) -> str:
    """Three digits."""
    if value < 0.005:
        return "<0.01" if value else "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
