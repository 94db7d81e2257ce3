"""Losses of a projection onto the vocabulary: time against the GEMMs alone, memory, error, peers.

    python benchmarks/loss_throughput.py

Operations of M tokens, hidden size H, vocabulary V, forward and backward together:
    cross-entropy, UCE   6·M·H·V    logits, dH, dW
    frozen head          4·M·H·V    logits, dH
    KL                   8·M·H·V    two logits, dH, dW
    CE + KL             12·M·H·V    two logits, two dH, two dW
The floor of each is its GEMMs alone, into memory that is there, timed in the same rounds.
Memory is the peak beyond the inputs, the gradients included. Errors are ‖x - x64‖ / ‖x64‖ of dH and
dW together, x64 the same in float64 from the same inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from _common import (
    Row,
    free_memory,
    interleaved_medians,
    print_table,
    provenance,
    results_folder,
    rows_or_none,
    save_json,
    save_plot,
)
from torch import Tensor

import mollm_ops
from mollm_ops.reference.losses import (
    ce_rows_reference,
    kl_rows_reference,
)

# (M, H, V): SmolLM2-135M, a two-billion model, then Llama-3-8B
CPU_SHAPES = [(1024, 576, 49152), (512, 2048, 128256)]
GPU_SHAPES = [(1024, 576, 49152), *((M, 4096, 128256) for M in (1024, 4096, 8192, 16384))]
QUICK_SHAPES = [(256, 256, 16384)]
EXACT_ROWS = 4096  # above, the float64 comparison does not fit beside the inputs on a GPU
GEMMS = {"ce": 3, "uce": 3, "ce, frozen head": 2, "kl": 4, "ce + kl": 6}


@dataclass
class Inputs:
    """What every loss is computed from; hidden and weight require gradients."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [M]
    ref_hidden: Tensor  # [M, H]
    ref_weight: Tensor  # [V, H]

    @staticmethod
    def make(M: int, H: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
        torch.manual_seed(0)

        def randn(rows: int, scale: float) -> Tensor:
            return (scale * torch.randn(rows, H, device=device)).to(dtype)

        hidden, weight = randn(M, 1.0), randn(V, H**-0.5)
        return Inputs(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            torch.randint(V, (M,), device=device),
            (hidden.detach() + randn(M, 0.1)).to(dtype),
            (weight.detach() + randn(V, 0.1 * H**-0.5)).to(dtype),
        )

    def double(self) -> Inputs:
        def wide(x: Tensor) -> Tensor:
            return x.detach().double().requires_grad_(x.requires_grad)

        tensors = (self.hidden, self.weight, self.ref_hidden, self.ref_weight)
        h, w, hr, wr = (wide(x) for x in tensors)
        return Inputs(h, w, self.target, hr, wr)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


T = TypeVar("T")
Loss = Callable[[Inputs], Tensor]


def eager(loss: str) -> Loss:
    """What one would write with plain Torch; logits in the inputs' dtype, losses in float32."""

    def logits(x: Inputs) -> Tensor:
        return F.linear(x.hidden, x.weight)

    def wide(z: Tensor) -> Tensor:
        return z if z.dtype == torch.float64 else z.float()

    def kl(x: Inputs) -> Tensor:
        with torch.no_grad():
            z_ref = wide(F.linear(x.ref_hidden, x.ref_weight))
        return kl_rows_reference(wide(logits(x)), z_ref).mean()

    return {
        "ce": lambda x: F.cross_entropy(logits(x), x.target),
        "uce": lambda x: ce_rows_reference(wide(logits(x)), x.target, 1e-3).mean(),
        "ce, frozen head": lambda x: F.cross_entropy(logits(x), x.target),
        "kl": kl,
        "ce + kl": lambda x: F.cross_entropy(logits(x), x.target) + kl(x),
    }[loss]


def ours(loss: str, chunk_rows: int | None = None) -> Loss:
    def kl(x: Inputs) -> Tensor:
        return mollm_ops.linear_kl_div(
            x.hidden, x.weight, x.ref_hidden, x.ref_weight, chunk_rows=chunk_rows
        )

    def ce(x: Inputs) -> Tensor:
        return mollm_ops.linear_cross_entropy(x.hidden, x.weight, x.target, chunk_rows=chunk_rows)

    def both(x: Inputs) -> Tensor:
        losses = mollm_ops.linear_ce_kl(
            x.hidden, x.weight, x.target, x.ref_hidden, x.ref_weight, chunk_rows=chunk_rows
        )
        return losses[0] + losses[1]

    return {
        "ce": ce,
        "uce": lambda x: mollm_ops.linear_uce_loss(
            x.hidden, x.weight, x.target, chunk_rows=chunk_rows
        ),
        "ce, frozen head": ce,
        "kl": kl,
        "ce + kl": both,
    }[loss]


def peers(loss: str, device: str) -> dict[str, Loss]:
    """Other packages' losses, those that are installed and run on the device."""
    found: dict[str, Loss] = {}
    if loss != "ce":
        return found
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # without options it is plain eager
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda x: F.linear_cross_entropy(
            x.hidden, x.weight, x.target, options=options
        )
    theirs = {
        "liger_kernel": ("Liger", _liger),
        "cut_cross_entropy": ("cut-cross-entropy", _cut_cross_entropy),
        "quack": ("quack", _quack),
    }
    if device == "cuda":
        found |= {name: call for package, (name, call) in theirs.items() if find_spec(package)}
    return found


# Imported where they are called, so that a package that cannot be is a row that says why.


def _liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden, x.target)


def _cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.target)


def _quack(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.hidden, x.weight, x.target)


def floor(loss: str, x: Inputs) -> Callable[[], None]:
    """The GEMMs of a loss, into memory that is there."""
    h, w = x.hidden.detach(), x.weight.detach()
    z = h @ w.t()
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    projections = 2 if "kl" in loss else 1
    products = 2 if "+" in loss else 1

    def run() -> None:
        for _ in range(projections):
            torch.mm(h, w.t(), out=z)
        for _ in range(products):
            torch.mm(z, w, out=dh)
            if "frozen" not in loss:
                torch.mm(z.t(), h, out=dw)

    return run


def backward_of(loss: Loss, x: Inputs) -> Callable[[], None]:
    def run() -> None:
        x.clear()
        loss(x).backward()

    return run


def peak_bytes(call: Callable[[], None], device: str) -> float | None:
    """Peak memory of the call beyond what was held before it; None where it cannot be read."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would not count
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return float(_status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {field}, but it has not.")


def gradients_of(loss: Loss, x: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss(x), [t for t in (x.hidden, x.weight) if t.requires_grad]))


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖got - exact‖ / ‖exact‖ over all tensors, a block of rows at a time."""
    difference = norm = 0.0
    for g, e in zip(got, exact, strict=True):
        for part, exact_part in zip(g.split(4096), e.split(4096), strict=True):
            difference += float((part.double() - exact_part).square().sum())
            norm += float(exact_part.square().sum())
    return (difference / norm) ** 0.5


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """What compute returns, None where it runs out of memory."""
    try:
        return compute()
    except torch.cuda.OutOfMemoryError:
        free_memory()
    return None


def measure(
    loss: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    options: argparse.Namespace,
) -> list[Row]:
    """One row for each implementation of a loss."""
    x = Inputs.make(*shape, dtype, device)
    x.weight.requires_grad_("frozen" not in loss)
    methods: dict[str, Loss] = {"mollm": ours(loss)}
    if device == "cuda":
        methods["mollm, chunk_rows=1024"] = ours(loss, chunk_rows=1024)
    methods |= {"eager": eager(loss), **peers(loss, device)}
    if not (options.quick or options.no_compile) and loss == "ce":
        methods["eager, compiled"] = torch.compile(eager(loss))
    calls = {"floor": floor(loss, x)}
    for name, method in methods.items():
        calls[name] = backward_of(method, x)
        calls[f"{name}/forward"] = lambda method=method: method(x)  # type: ignore[misc]
    slow = {n: c for n, c in calls.items() if n.startswith("F.") and device == "cpu"}
    fast = {n: c for n, c in calls.items() if n not in slow}
    theirs = {n for n in calls if n != "floor" and not n.startswith("mollm")}
    reasons: dict[str, str] = {}
    turns = partial(interleaved_medians, device=device, peers=theirs, reasons=reasons)
    seconds = turns(fast, rounds=options.rounds)
    seconds |= turns(slow, rounds=1, warmup=0)
    memory = {}
    for name in methods:
        x.clear()
        call = partial(peak_bytes, calls[name], device)
        memory[name] = None if math.isnan(seconds[name]) else unless_out_of_memory(call)
    x.clear()
    del call, calls, slow, fast
    exact = None
    if not options.no_error and (device != "cuda" or shape[0] <= EXACT_ROWS):
        exact = unless_out_of_memory(lambda: gradients_of(eager(loss), x.double()))
    rows = []
    for name, method in methods.items():
        parts = (name, f"{name}/forward", "floor")
        failed = next((reasons[n] for n in parts if n in reasons), None)
        lost = [n for n in parts if math.isnan(seconds[n]) and n not in reasons]
        error = None
        if exact is not None and not lost and failed is None:
            error = unless_out_of_memory(
                lambda method=method: relative_error(gradients_of(method, x), exact)
            )
        rows.append(
            {
                "loss": loss,
                "M, H, V": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "method": name,
                "forward ms": 1e3 * seconds[f"{name}/forward"],
                "both ms": 1e3 * seconds[name],
                "x floor": seconds[name] / seconds["floor"],
                "x mollm": seconds[name] / seconds["mollm"],
                "MiB": None if memory[name] is None else memory[name] / 2**20,
                "error": error,
                **({"out of memory": ", ".join(lost)} if lost else {}),
                **({"failed": failed} if failed else {}),
            }
        )
    return rows


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time over the GEMM floor, one panel for every loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = list(dict.fromkeys(row["loss"] for row in rows))
    figure, panels = plt.subplots(
        len(losses),
        figsize=(8, 0.26 * len(rows) + 1.0 * len(losses)),
        layout="constrained",
        squeeze=False,
        height_ratios=[sum(r["loss"] == loss for r in rows) for loss in losses],
    )
    for axes, loss in zip(panels[:, 0], losses, strict=True):
        some = [row for row in rows if row["loss"] == loss]
        labels = [f"{r['method']}, {r['M, H, V']}, {r['dtype']}" for r in some]
        colors = ["#3b6ea5" if r["method"].startswith("mollm") else "#b8b8b8" for r in some]
        axes.barh(range(len(some)), [r["x floor"] for r in some], color=colors)
        axes.set_yticks(range(len(some)), labels, fontsize=7)
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axes.invert_yaxis()
        axes.set_title(f"{loss}: {GEMMS[loss]} GEMMs = 1", fontsize=8, loc="left")
    panels[-1, 0].set_xlabel("forward + backward over its GEMMs alone")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes JSON and PNG under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--losses", nargs="+", choices=list(GEMMS), default=list(GEMMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small shape, for a first look")
    parser.add_argument("--rows", type=int, nargs="+", help="only the shapes of so many rows, M")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-error", action="store_true", help="leave out the float64 comparison")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = provenance(device, "liger-kernel", "cut-cross-entropy", "quack-kernels")
    shapes = QUICK_SHAPES if options.quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES
    shapes = [shape for shape in shapes if not options.rows or shape[0] in options.rows]
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    path = options.json or results_folder(device) / "loss_throughput.json"
    rows: list[Row] = []
    for shape in shapes:
        for dtype in dtypes:
            for loss in options.losses:
                part = rows_or_none(
                    partial(measure, loss, shape, dtype, device, options),
                    {
                        "loss": loss,
                        "M, H, V": "x".join(map(str, shape)),
                        "dtype": str(dtype).removeprefix("torch."),
                    },
                )
                print_table(part, f"{loss}, {shape}, {dtype}")
                rows += part
                save_json(path, source, rows)
    save_plot(plot, path, source, rows)


if __name__ == "__main__":
    main()
