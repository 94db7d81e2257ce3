"""Gram matrix, solver and weighted sum of K gradients: speed against memory bandwidth and peers.

    python benchmarks/gram_throughput.py

Bytes of an ideal implementation, P elements of s bytes in each of K gradients:
    gram     K·P·s            every gradient read once
    metric   (K + 1)·P·s      and Adam's second moment: the Gram matrix of the default method
    combine  (K + 1)·P·s      every gradient read once more, the direction written
The read bandwidth is that of torch.sum over as many bytes, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import (
    Row,
    elements_that_fit,
    interleaved_medians,
    print_table,
    provenance,
    results_folder,
    rows_or_none,
    save_json,
    save_plot,
    title_of,
)
from torch import Tensor

from mollm_ops import combine, dual_space_weights, gram, gram_direction, gram_moved
from mollm_ops.operands import AdamMetric
from mollm_ops.reference.gram import gram_reference

HELD = 24  # tensors of P elements at K = 4: five times the gradients with the peers, the sum, v
LLAMA_8B_LAYER = [
    (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096),
    (14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,),
]  # fmt: skip


def shapes_of(kind: str, elements: int) -> list[tuple[int, ...]]:
    """A list of tensor shapes with about `elements` elements in all."""
    if kind == "one tensor":
        return [(elements,)]
    if kind == "small tensors":
        return [(64, 64)] * max(1, elements // 4096)
    shapes: list[tuple[int, ...]] = []
    layer = sum(torch.Size(s).numel() for s in LLAMA_8B_LAYER)
    for _ in range(max(1, elements // layer)):
        shapes.extend(LLAMA_8B_LAYER)
    return shapes


def peers(gradients: list[list[Tensor]]) -> dict[str, Callable[[], object]]:
    """What one would write with plain Torch or TorchJD. The stacked matrix is given to them."""
    flat = [torch.cat([t.reshape(-1) for t in ts]) for ts in gradients]
    M = torch.stack(flat)
    calls: dict[str, Callable[[], object]] = {
        "stack + M Mᵀ": lambda: (N := torch.stack(flat)) @ N.T,
        "M Mᵀ": lambda: M @ M.T,
    }
    if M.dtype == torch.float32 or M.is_cuda:
        calls["pairwise dots"] = lambda: [
            torch.dot(a, b) for i, a in enumerate(flat) for b in flat[: i + 1]
        ]
    try:
        from torchjd.aggregation import MGDA
    except ImportError:
        return calls
    calls["TorchJD MGDA()(J)"] = lambda: MGDA()(M)
    return calls


def measure(K: int, kind: str, elements: int, dtype: torch.dtype, device: str, rounds: int) -> Row:
    """One row of the table: our times, the peers' as ratios to ours, the error."""
    shapes = shapes_of(kind, elements)
    gradients = [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(K)]
    P = sum(t.numel() for t in gradients[0])
    read_bytes = K * P * dtype.itemsize
    G = gram(gradients)
    weights = dual_space_weights(G).weights
    out = [torch.empty_like(t) for t in gradients[0]]
    plain = torch.randn(read_bytes // 4, device=device)
    others = peers(gradients) if kind == "one tensor" else {}
    moments = AdamMetric(
        [torch.rand_like(t) for t in gradients[0]],
        [torch.ones((), device=device) for _ in shapes],
        torch.full((K,), 1 / K**2, dtype=torch.float64, device=device),
    )
    reasons: dict[str, str] = {}
    seconds = interleaved_medians(
        {
            "read": lambda: plain.sum(),
            "gram": lambda: gram(gradients),
            "metric": lambda: gram_moved(gradients, None, moments),
            "solve": lambda: dual_space_weights(G),
            "combine": lambda: combine(gradients, weights, out=out),
            "all": lambda: gram_direction(gradients, out=out),
            **others,
        },
        device,
        rounds=rounds,
        peers=others,
        reasons=reasons,
    )
    exact = gram_reference(gradients)
    norms = exact.diagonal().sqrt()
    ours = {"gram": seconds["gram"], "all": seconds["all"]}
    lost = [name for name, t in seconds.items() if math.isnan(t) and name not in reasons]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": kind,
        "K": K,
        "P": float(P),
        "gram ms": 1e3 * seconds["gram"],
        "GB/s": read_bytes / seconds["gram"] / 1e9,
        "of read": seconds["read"] / seconds["gram"],
        "metric ms": 1e3 * seconds["metric"],
        "metric of read": (K + 1) / K * seconds["read"] / seconds["metric"],
        "solve us": 1e6 * seconds["solve"],
        "combine ms": 1e3 * seconds["combine"],
        "combine GB/s": (K + 1) / K * read_bytes / seconds["combine"] / 1e9,
        "all ms": 1e3 * seconds["all"],
        "error": float(((G - exact) / (norms[:, None] * norms)).abs().max()),
        **{
            f"x {name}": seconds[name] / ours["all" if "TorchJD" in name else "gram"]
            for name in others
        },
        **(
            {"out of memory": ", ".join(set(lost) - set(reasons))}
            if set(lost) - set(reasons)
            else {}
        ),
        **({"failed": "; ".join(f"{n}: {r}" for n, r in reasons.items())} if reasons else {}),
    }


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Gram throughput per row as bars, read bandwidth as 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['dtype']}, K={r['K']}, {r['shapes']}" for r in rows]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.4), layout="constrained")
    axes.barh(labels, [r["of read"] for r in rows], color="#3b6ea5")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("Gram throughput as a share of read bandwidth (torch.sum)")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cases(
    device: str, quick: bool, elements: int | None
) -> list[tuple[int, str, int, torch.dtype]]:
    """(K, shapes, P, dtype) of every row."""
    largest = elements or elements_that_fit(device, HELD * torch.float32.itemsize)
    if quick:
        largest = min(largest, 10**7)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for K in (2, 3, 4, 8):
            rows.append((K, "one tensor", largest if K <= 4 else largest // 4, dtype))
        if not (quick or elements):
            layer = sum(torch.Size(s).numel() for s in LLAMA_8B_LAYER)
            rows.append((3, "llama-3-8b layers", max(largest, layer), dtype))
        rows.append((3, "small tensors", largest // 10, dtype))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes JSON and PNG under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, help="P of the large rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="P = 1e7, for a first look")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = provenance(device, "torchjd", "numpy")
    path = options.json or results_folder(device) / "gram_throughput.json"
    rows: list[Row] = []
    for K, kind, elements, dtype in cases(device, options.quick, options.elements):
        what = {"dtype": str(dtype).removeprefix("torch."), "shapes": kind, "K": K}
        part = rows_or_none(
            lambda case=(K, kind, elements, dtype): [measure(*case, device, options.rounds)],
            {**what, "P": float(elements)},
        )
        print_table(part, f"{kind}, K={K}, {dtype}")
        rows += part
        save_json(path, source, rows)
    table = [{k: v for k, v in r.items() if not k.startswith("x ")} for r in rows]
    print_table(table, title_of(source))
    save_plot(plot, path, source, rows)


if __name__ == "__main__":
    main()
