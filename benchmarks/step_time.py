"""One optimizer step of K objectives against Torch's fused AdamW on one gradient.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --train    the whole training step, see _training_step.py
    python benchmarks/step_time.py --train --preset llama-3-8b
                                              one that trains in full on one card, streamed alone

Bytes of an ideal implementation, P elements of s bytes, K gradients:
    Torch's AdamW     (1 + 3 + 3)·P·s      reads g, θ, m, v; writes θ, m, v
    update            (K + 3 + 3)·P·s      reads K gradients, θ, m, v; writes θ, m, v
    a step            K gradients twice, θ and the mode's own state read and written, and what its
                      Gram matrix reads besides: v for Adam's metric, the means of every objective
Torch's time scaled by these bytes is what each must be compared with. `copy` is `Tensor.copy_` over
as many bytes, as a physical floor.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import _training_step
import torch
from _common import (
    Row,
    elements_that_fit,
    free_memory,
    interleaved_medians,
    print_table,
    provenance,
    results_folder,
    rows_or_none,
    save_json,
    save_plot,
)
from gram_throughput import LLAMA_8B_LAYER, shapes_of
from torch import Tensor

from mollm import MOLLMOptimizer
from mollm.optim.bases import AdamW
from mollm.planning import shapes

OBJECTIVES = 3
HELD = 32  # tensors of P elements: gradients, parameters, and the states of all that is compared
MODES: dict[str, dict[str, object]] = {
    "AdamW, Adam's metric": {},
    "AdamW, Adam's metric, no tracking": {"track_conflicts": False},
    "AdamW, Adam's metric, momentum per objective": {"momentum": "per-objective"},
    "AdamW, Euclidean metric": {"metric": "euclidean"},
    "AdamW, Euclidean metric, momentum per objective": {
        "metric": "euclidean",
        "momentum": "per-objective",
    },
    "SGD with momentum": {"base": "sgd", "momentum": 0.9},
}


class PreparedStep:
    """An optimizer whose gradients are handed in anew before every step, as backward would."""

    def __init__(self, params: list[Tensor], gradients: list[list[Tensor]], **mode: object) -> None:
        names = [f"objective {k}" for k in range(len(gradients))]
        self.opt = MOLLMOptimizer(params, lr=1e-6, objectives=names, **mode)  # type: ignore[arg-type]
        self.names, self.params, self.gradients = names, params, gradients
        self.mode = mode

    def __call__(self) -> None:
        for name, tensors in zip(self.names, self.gradients, strict=True):
            with self.opt.objective(name):
                for p, g in zip(self.params, tensors, strict=True):
                    p.grad = g
        self.opt.step()

    def bytes_moved(self) -> int:
        """What an ideal step reads and writes, once a first step has made the state."""
        gradients = sum(t.nbytes for tensors in self.gradients for t in tensors)
        params = sum(p.nbytes for p in self.params)
        state = {
            name: sum(self.opt.state[p][name].nbytes for p in self.params)
            for name, t in self.opt.state[self.params[0]].items()
            if isinstance(t, Tensor) and t.shape == self.params[0].shape
        }
        means = gradients if self.mode.get("momentum") == "per-objective" else 0
        metric = state.get("exp_avg_sq", 0) if self.opt.metric == "base" else 0
        return 2 * (gradients + params + sum(state.values())) + 3 * means + metric


def measure(
    K: int, kind: str, elements: int, dtype: torch.dtype, device: str, rounds: int
) -> list[Row]:
    """One row per mode, all measured in turns with Torch's step and the copy."""
    shapes = shapes_of(kind, elements)
    gradients = [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(K)]
    params = [torch.nn.Parameter(torch.randn_like(t)) for t in gradients[0]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, g in zip(theirs, gradients[0], strict=True):
        p.grad = g
    torchs = torch.optim.AdamW(theirs, lr=1e-6, fused=True)
    P = sum(p.numel() for p in params)
    source = torch.randn(P, device=device).to(dtype)
    target = torch.empty_like(source)
    alone = AdamW(params, lr=1e-6)
    weights = torch.full((K,), 1 / K, dtype=torch.float64, device=device)
    prepared = {name: PreparedStep(params, gradients, **mode) for name, mode in MODES.items()}
    seconds = interleaved_medians(
        {
            "torch": torchs.step,
            "copy": lambda: target.copy_(source),
            "update": lambda: alone.step_along(params, gradients, weights),
            "update tracked": lambda: alone.step_along(params, gradients, weights, track=True),
            **prepared,
        },
        device,
        rounds=rounds,
    )
    unit = P * dtype.itemsize
    torch_bytes = 7
    rows = []
    for name in ("update", "update tracked", *MODES):
        whole = name in MODES
        ran = whole and not math.isnan(seconds[name])
        volume = prepared[name].bytes_moved() if ran else (K + 6) * unit
        torch_by_bytes = seconds["torch"] * volume / (torch_bytes * unit)
        lost = [n for n in (name, "torch", "copy") if math.isnan(seconds[n])]
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "shapes": kind,
                "K": K,
                "P": float(P),
                "what": name if not whole else f"step: {name}",
                "ms": 1e3 * seconds[name],
                "GB/s": volume / seconds[name] / 1e9,
                "of copy": volume / (2 * unit) * seconds["copy"] / seconds[name],
                "torch AdamW ms": 1e3 * seconds["torch"],
                "torch GB/s": torch_bytes * unit / seconds["torch"] / 1e9,
                "time / torch by bytes": seconds[name] / torch_by_bytes,
                **({"out of memory": ", ".join(lost)} if lost else {}),
            }
        )
    return rows


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time over Torch's time scaled by bytes, one bar per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['what']}, {r['dtype']}, {r['shapes']}" for r in rows]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.4), layout="constrained")
    axes.barh(labels, [r["time / torch by bytes"] for r in rows], color="#3b6ea5")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("time over that of torch.optim.AdamW(fused=True), scaled by bytes moved")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes JSON and PNG under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, help="P of the large rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="P = 1e6, for a first look")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument(
        "--train",
        action="store_true",
        help="the whole training step against that of the weighted sum of the same losses",
    )
    parser.add_argument(
        "--preset",
        choices=sorted(shapes.NAMED_SHAPES),
        help="with --train: only the streamed step of this model, with random weights",
    )
    parser.add_argument("--cases", type=int, help="with --train, only so many cases")
    parser.add_argument(
        "--layers", type=int, help="so many layers of Llama-3-8B in bfloat16, of its 32"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    elements = options.elements or elements_that_fit(device, HELD * torch.float32.itemsize)
    if options.quick:
        elements = 10**6
    if options.train:
        _train(options, device)
        return
    source = provenance(device)
    path = options.json or results_folder(device) / "step_time.json"
    rows: list[Row] = []
    sizes = [
        (dtype, kind, size)
        for dtype in (torch.float32, torch.bfloat16)
        for kind, size in (("one tensor", elements), ("small tensors", elements // 50))
    ]
    if options.layers:
        layer = sum(torch.Size(s).numel() for s in LLAMA_8B_LAYER)
        sizes = [(torch.bfloat16, "llama-3-8b layers", options.layers * layer)]
    for dtype, kind, size in sizes:
        part = rows_or_none(
            partial(measure, OBJECTIVES, kind, size, dtype, device, options.rounds),
            {"dtype": str(dtype).removeprefix("torch."), "shapes": kind, "P": float(size)},
        )
        gc.collect()
        print_table(part, f"{kind}, {dtype}")
        rows += part
        save_json(path, source, rows)
    save_plot(plot, path, source, rows)


def _train(options: argparse.Namespace, device: str) -> None:
    source = provenance(device, "transformers", "peft")
    path = options.json or results_folder(device) / "step_time_train.json"
    rows: list[Row] = []
    cases = _training_step.cases(device, quick=options.quick)
    if options.preset:
        cases = iter([_training_step.streamed_case(options.preset, device, quick=options.quick)])
    for case in islice(cases, options.cases):
        part = rows_or_none(
            partial(_training_step.rows_of, case, device, options.rounds), {"case": case.name}
        )
        free_memory()
        print_table(part, case.name)
        rows += part
        save_json(path, source, rows)
    save_plot(_training_step.plot, path, source, rows)


if __name__ == "__main__":
    main()
