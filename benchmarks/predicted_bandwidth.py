"""The share of a GPU's bandwidth that its kernels can reach, from what the compiler made of them.

    python benchmarks/predicted_bandwidth.py

Needs nvcc and nvdisasm, and no GPU. For rows of 16 bits, the least of
    0.90                                                    what a copy reaches
    0.90 · bytes on their way / (latency · bandwidth)       of one multiprocessor, latency 0.8 µs
    bytes of a turn / (instructions · warps / 4 / clock)    over the bandwidth of a multiprocessor
where the instructions are those of a loop's whole text, so more than any one dtype runs. What a
row kernel's last sweep reads of rows of 16 bits comes from the L2 cache, latency 0.4 µs. It is an
upper bound of what can be expected, and no measurement.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import Row, print_table
from device_code import LLAMA_3, Kernel, Loop, compiled, compiled_rows

from mollm_ops._rows_triton import (
    MAX_BLOCK,
    MAX_KL_BLOCK,
    config_of,
    kl_rows_kernel,
    log_rows_kernel,
)

COPY, LATENCY, CACHE_LATENCY, ARCHITECTURE = 0.90, 0.8e-6, 0.4e-6, "sm_90"


@dataclass(frozen=True)
class Device:
    bandwidth: float  # bytes / s
    multiprocessors: int = 132
    clock: float = 1.755e9

    @property
    def share(self) -> float:
        """Bytes / s of one multiprocessor."""
        return self.bandwidth / self.multiprocessors


DEVICES = {"H100": Device(3.35e12), "H200": Device(4.8e12)}


def predicted(
    device: Device,
    flying: float,
    moved: float,
    instructions: int,
    warps: int,
    latency: float = LATENCY,
) -> float:
    """The share of the device's bandwidth.

    Args:
        flying: bytes on their way to a multiprocessor while its warps wait.
        moved: bytes that its warps read from memory and write in one turn of the loop.
        instructions: of one warp's turn.
    """
    seconds = instructions * warps / 4 / device.clock
    waiting = COPY * flying / (latency * device.share)
    return min(COPY, waiting, moved / seconds / device.share)


def row_of(name: str, kernel: Kernel, blocks: int, rows: int, written: int = 0) -> Row:
    """Of a kernel that reads `rows` rows of bfloat16 at a time and writes `written` of them."""
    loop = next(
        loop for loop in kernel.loops if loop.loads == (2 * rows if loop.alternatives else rows)
    )
    warps = 8 * min(blocks, kernel.blocks)
    flying = rows * 16 * 32 * warps
    moved = flying * (rows + written) / rows
    return {
        "kernel": name,
        "registers": kernel.registers,
        "blocks": warps // 8,
        "kB on their way": flying / 1e3,
        **{
            d: predicted(device, flying, moved, loop.instructions, warps)
            for d, device in DEVICES.items()
        },
    }


def rows_row(name: str, kernel: object, dtype: torch.dtype, folder: Path) -> Row:
    """Of a row kernel with all its gradients: sweeps of one row, which have loops of their own."""
    is_kl = kernel is kl_rows_kernel
    flags = {"HAS_CAP": False, "NARROW": False}
    if is_kl:
        flags |= dict.fromkeys(("HAS_CE", "HAS_KL_GRADIENT", "HAS_CE_GRADIENT"), True)
        flags["HAS_REF_CAP"] = False
    else:
        flags |= {"HAS_EPS": True, "HAS_GRADIENT": True}
    code, _ = compiled_rows(kernel, (dtype, dtype), flags, 90, folder)
    config = config_of(LLAMA_3, MAX_KL_BLOCK if is_kl else MAX_BLOCK)
    *first, last = code.loops
    read, written = len(first), 2 if is_kl else 1  # rows

    def flying(loop: Loop) -> float:
        return loop.loads * 16 * 32 * config.num_warps

    def share(device: Device) -> float:
        block = config.BLOCK * dtype.itemsize  # the first sweeps take two in a turn
        moved = seconds = 0.0  # per block
        for loop in first:
            part = (flying(loop), 2 * block, loop.instructions, config.num_warps)
            moved += block
            seconds += block / predicted(device, *part)
        cached = dtype.itemsize == 2
        turn = written * block if cached else (read + written) * block
        on_its_way = flying(last) * turn / (read * block)
        latency = CACHE_LATENCY if cached else LATENCY
        part = (on_its_way, turn, last.instructions, config.num_warps)
        seconds += turn / predicted(device, *part, latency)
        return (moved + turn) / seconds

    return {
        "kernel": name,
        "registers": code.registers,
        "blocks": 1,
        "kB on their way": flying(first[0]) / 1e3,
        **{d: share(device) for d, device in DEVICES.items()},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = {k.name: k for k in compiled("gram_cuda.cu", ARCHITECTURE, Path(folder))}
    rows = []
    for K in (3, 8):
        least = 4 if K == 3 else 2
        rows += [
            row_of(f"Gram, K = {K}", kernels[f"gram_kernel<{K}>"], least, K),
            row_of(
                f"Gram in Adam's metric, K = {K}",
                kernels[f"gram_moved_kernel<{K},false>"],
                2 if K == 3 else 1,
                K + 1,
            ),
            row_of(
                f"Gram of means in the metric, K = {K}",
                kernels[f"gram_moved_kernel<{K},true>"],
                2 if K == 3 else 1,
                2 * K + 1,
            ),
            row_of(f"weighted sum, K = {K}", kernels[f"combine_kernel<{K}>"], least, K, 1),
        ]
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel, dtype in (
            ("UCE and its gradient", log_rows_kernel, torch.bfloat16),
            ("the same of float32", log_rows_kernel, torch.float32),
            ("KL, CE and both gradients of float32", kl_rows_kernel, torch.float32),
        ):
            rows.append(rows_row(name, kernel, dtype, Path(folder)))
    print_table(rows, f"{ARCHITECTURE}, bfloat16 unless said: predicted, not measured")


if __name__ == "__main__":
    main()
