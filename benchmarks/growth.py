"""How time and memory of a step grow: curves, their slopes, and where they bend.

    python benchmarks/growth.py
    python benchmarks/growth.py --curves tokens processes

One curve for each of
    tokens        of a step, both batches together: the whole training step
    vocabulary    the same step, and how many words the model knows
    parameters    the same step, by the number of layers
    tensors       P = 1e7 elements in so many tensors: MOLLMOptimizer.step, K = 3
    objectives    P = 1e7, K from 1 to 16: MOLLMOptimizer.step
    processes     copies on one machine over gloo, each with the rows of the step that stands first

A point has a peer that runs in turns with it: the step of the weighted sum with
torch.optim.AdamW(fused=True), or that optimizer's step alone. `slope` is d log(time) / d log(x)
since the point before: 0 where a fixed cost rules, 1 where time grows in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _common import (
    Row,
    interleaved_medians,
    most_allocated,
    print_table,
    provenance,
    results_folder,
    save_json,
    save_plot,
)
from _training_step import CPU_SETTINGS, SMALL, Case, peak, prepared
from step_time import PreparedStep
from torch import Tensor

from mollm.system.units import GIB

ELEMENTS = 10**7
CONFIG = SMALL | {"vocab_size": 8192}
SETTINGS = replace(CPU_SETTINGS, batch_size=2, sequence_length=64)
POINTS: dict[str, tuple[int, ...]] = {
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "vocabulary": (1024, 4096, 16384, 65536, 131072),
    "parameters": (1, 2, 4, 8, 16, 32),
    "tensors": (10, 30, 100, 300, 1000, 3000, 10000),
    "objectives": (1, 2, 3, 4, 6, 8, 9, 12, 16),
    "processes": (1, 2, 4, 8),
}
FEWEST = 2
"""Points of every curve with --quick."""


def training_step(
    device: str, rounds: int, batch_size: int = SETTINGS.batch_size, **config: int
) -> tuple[int, Row]:
    """The number of weights that train, and a point of the whole training step."""
    settings = replace(SETTINGS, batch_size=batch_size, device=device, freeze_embeddings=True)
    case = Case("growth", CONFIG | config, settings)
    with prepared(case, device) as steps:
        calls = {name: steps[name] for name in ("weighted sum", "MOLLM")}
        seconds = interleaved_medians(calls, device, rounds=rounds)
        memory = peak(steps["MOLLM"], case)  # type: ignore[arg-type]
    return case.plan.trainable, _point(seconds["MOLLM"], seconds["weighted sum"]) | memory


def optimizer_step(K: int, tensors: int, device: str, rounds: int) -> Row:
    """A point of the optimizer's step on so many tensors of equal size."""
    size = ELEMENTS // tensors
    gradients = [[torch.randn(size, device=device) for _ in range(tensors)] for _ in range(K)]
    params = [torch.nn.Parameter(torch.randn_like(t)) for t in gradients[0]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, g in zip(theirs, gradients[0], strict=True):
        p.grad = g
    ours = PreparedStep(params, gradients)
    torchs = torch.optim.AdamW(theirs, lr=1e-6, fused=True)
    seconds = interleaved_medians({"ours": ours, "torch": torchs.step}, device, rounds=rounds)
    held: Sequence[Tensor] = [t for one in gradients for t in one]
    state = (v for entry in ours.opt.state.values() for v in entry.values())
    lasting = sum(t.nbytes for t in (*held, *params, *state))
    return _point(seconds["ours"], seconds["torch"]) | {
        "peak GiB": (lasting + most_allocated(ours)) / GIB
    }


def of_processes(count: int, rounds: int) -> Row:
    """A point of the training step in so many copies, each with rows of its own."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        told = Path(folder) / "point.json"
        torch.multiprocessing.spawn(_copy, (count, port, rounds, str(told)), nprocs=count)
        return json.loads(told.read_text())


def _copy(rank: int, count: int, port: int, rounds: int, told: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    address = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=count)
    _, point = training_step("cpu", rounds)
    if rank == 0:
        Path(told).write_text(json.dumps(point))
    torch.distributed.destroy_process_group()


def _point(seconds: float, peer: float) -> Row:
    return {"ms": 1e3 * seconds, "peer ms": 1e3 * peer, "/ peer": seconds / peer}


def measured(curve: str, device: str, rounds: int, points: Sequence[int]) -> Iterator[Row]:
    """The points of one curve."""
    training = partial(training_step, device, rounds)
    tokens_of_two = 2 * SETTINGS.sequence_length
    of: dict[str, Callable[[int], tuple[int, Row]]] = {
        "tokens": lambda x: (x, training(batch_size=x // tokens_of_two)[1]),
        "vocabulary": lambda x: (x, training(vocab_size=x)[1]),
        "parameters": lambda x: training(num_hidden_layers=x),
        "tensors": lambda x: (x, optimizer_step(3, x, device, rounds)),
        "objectives": lambda x: (x, optimizer_step(x, 10, device, rounds)),
        "processes": lambda x: (x, of_processes(x, rounds)),
    }
    before: tuple[float, float] | None = None
    for wanted in points:
        x, point = of[curve](wanted)
        slope = None
        if before is not None:
            slope = math.log(point["ms"] / before[1]) / math.log(x / before[0])
        before = x, point["ms"]
        yield {"curve": curve, "x": float(x), **point, "slope": slope}


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Every curve in a field of its own: time on the left, peak memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, StrMethodFormatter

    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, fields = plt.subplots(
        math.ceil(len(curves) / 3), min(3, len(curves)), squeeze=False, figsize=(12, 6.5)
    )
    for axes, curve in zip(fields.flat, curves, strict=False):
        points = [row for row in rows if row["curve"] == curve]
        x = [p["x"] for p in points]
        axes.loglog(x, [p["ms"] for p in points], "o-", color="#3b6ea5", label="step, ms")
        axes.loglog(x, [p["peer ms"] for p in points], "o--", color="#999", label="peer, ms")
        axes.set_xlabel(curve)
        axes.set_xticks(x)
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
        axes.tick_params("x", labelsize=7, rotation=30)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right = axes.twinx()
        right.plot(x, [p["peak GiB"] for p in points], "s:", color="#b5533c", label="peak, GiB")
        right.set_ylim(0, 1.1 * max(p["peak GiB"] for p in points))
        axes.legend(handles=[*axes.lines, *right.lines], fontsize=7)
    for axes in list(fields.flat)[len(curves) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the curves, and writes JSON and PNG under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--curves", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"{FEWEST} points of each curve")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = provenance(device, "transformers")
    path = options.json or results_folder(device) / "growth.json"
    rows: list[Row] = []
    for curve in options.curves:
        points = POINTS[curve][:FEWEST] if options.quick else POINTS[curve]
        part = list(measured(curve, device, options.rounds, points))
        print_table(part, curve)
        rows += part
        save_json(path, source, rows)
    save_plot(plot, path, source, rows)


if __name__ == "__main__":
    main()
