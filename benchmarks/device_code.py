"""What compilers made of the CUDA and Triton sources: registers, spills, loads of the hot loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names."""
LLAMA_3 = 128256
"""Its vocabulary."""


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel that reads memory.

    Attributes:
        loads: 16-byte loads a thread has on their way before it waits for the first of them.
        alternatives: whether the same registers are loaded in two ways, as where a row's dtype is
            known at run time only: rows of 16 bits are then half of `loads`.
        instructions: how many the loop has, all alternatives together.
    """

    loads: int
    alternatives: bool
    instructions: int


@dataclass(frozen=True)
class Kernel:
    name: str  # as in gram_moved_kernel<3,false>
    registers: int
    spilled: int  # bytes
    loops: list[Loop]

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that a multiprocessor holds: it gives registers out by 8 a thread,
        of 65536."""
        return min(8, 65536 // (256 * (-(-self.registers // 8) * 8)))


def nvdisasm() -> str | None:
    """Triton brings one; so does the CUDA toolkit."""
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return str(bundled) if bundled.exists() else shutil.which("nvdisasm")


def compiled(source: str, architecture: str, folder: Path) -> list[Kernel]:
    """Every kernel of csrc/`source` for one architecture, such as sm_90."""
    cubin = folder / f"{source}.{architecture}.cubin"
    command = [
        str(NVCC), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DMOLLM_WITH_CUDA=1",
        f"-arch={architecture}", "-Xptxas=-v", "-cubin", str(ROOT / "csrc" / source),
        "-o", str(cubin),
    ]  # fmt: skip
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    loops = loops_of(cubin)
    return [
        Kernel(_name(mangled), registers, spilled, loops[mangled])
        for mangled, registers, spilled in _resources(report.stderr)
    ]


def ptxas() -> str | None:
    """Triton brings one; so does the CUDA toolkit."""
    try:
        import triton
    except ImportError:
        return shutil.which("ptxas")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin"
    # The architectures from sm_100 have an assembler of their own in some releases.
    found = [str(bundled / n) for n in ("ptxas-blackwell", "ptxas") if (bundled / n).exists()]
    return (found or [shutil.which("ptxas")])[0]


def compiled_triton(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    capability: int,
    warps: int,
    folder: Path,
    registers: int | None = None,
) -> tuple[Kernel, int]:
    """One Triton kernel, and the bytes of shared memory that a program takes.

    Args:
        types: The type of every argument that is not in `constants`.
        aligned: Arguments that are divisible by 16.
        registers: What a thread may have; None for what the compiler takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    done = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "maxnreg": registers},
    )
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(done.asm["ptx"])
    target = re.search(r"\.target (\S+?)(,|\s)", done.asm["ptx"])
    assert target
    command = [str(ptxas()), "-v", f"--gpu-name={target[1]}", str(ptx), "-o", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    ((name, used, spilled),) = _resources(report.stderr)
    loops = loops_of(cubin)[name] if nvdisasm() else []
    return Kernel(name, used, spilled, loops), done.metadata.shared


def compiled_rows(
    kernel: Any,
    dtypes: tuple[torch.dtype, torch.dtype],
    flags: Mapping[str, bool],
    capability: int,
    folder: Path,
) -> tuple[Kernel, int]:
    """A row kernel as it is launched for Llama 3's vocabulary, all strides divisible by 16.

    Args:
        dtypes: Of logits and gradients.
        flags: The kernel's own HAS_… and NARROW.
    """
    from mollm_ops import _rows_triton

    is_kl = kernel is _rows_triton.kl_rows_kernel
    config = _rows_triton.config_of(LLAMA_3, *([_rows_triton.MAX_KL_BLOCK] if is_kl else []))
    constants = {**flags, "BLOCK": config.BLOCK}
    numbers = ("eps", "rest", "logit_scale", "softcap", "ref_logit_scale", "ref_softcap")
    types = {}
    for name in kernel.arg_names:
        if name in numbers:
            types[name] = "fp32"
        elif name in ("logits", "ref_logits"):
            types[name] = f"*{SHORT[dtypes[0]]}"
        elif name.endswith("gradient"):
            types[name] = f"*{SHORT[dtypes[1]]}"
        elif name == "target":
            types[name] = "*i64"
        elif name.endswith(("losses", "scale")):
            types[name] = "*fp32"
        else:
            types[name] = "i32"
    plain = (*numbers, "R", *constants)
    aligned = [n for n in kernel.arg_names if n not in plain and "scale_stride" not in n]
    registers = _rows_triton.KL_REGISTERS if is_kl else None
    return compiled_triton(
        kernel, types, constants, aligned, capability, config.num_warps, folder, registers
    )


def loops_of(cubin: Path) -> dict[str, list[Loop]]:
    """The loops of every kernel in a file, by its mangled name."""
    return {name: list(_loops(lines)) for name, lines in _bodies(_listing(cubin)).items()}


def load_widths(cubin: Path) -> set[str]:
    """How wide the loads from global memory are, such as 128 (bits) or U16."""
    return {load.split(".")[-1] for load in re.findall(r"\bLDG\.\S+", _listing(cubin))}


def _listing(cubin: Path) -> str:
    done = subprocess.run(
        [str(nvdisasm()), "-c", str(cubin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _resources(report: str) -> Iterator[tuple[str, int, int]]:
    for part in report.split("Compiling entry function '")[1:]:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        yield part.split("'")[0], int(registers[1]), spilled


def _name(mangled: str) -> str:
    found = re.search(r"\d+([a-z_]+_kernel)(I\w+?EE)?", mangled)
    assert found, mangled
    arguments = re.findall(r"L([ib])(\d+)E", found[2] or "")
    words = [("false", "true")[int(n)] if kind == "b" else n for kind, n in arguments]
    return found[1] + (f"<{','.join(words)}>" if words else "")


def _bodies(listing: str) -> dict[str, list[str]]:
    """The lines of every kernel's code, labels included."""
    bodies: dict[str, list[str]] = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.M)[1:]:
        name = re.match(r"[\w$]+", part)
        assert name, part[:100]
        bodies[name[0]] = [
            line.strip()
            for line in part.splitlines()
            if re.match(r"\s*/\*[0-9a-f]{4,}\*/|\.L_", line)
        ]
    return bodies


def _loops(lines: list[str]) -> Iterator[Loop]:
    """The innermost loops that load sixteen bytes and multiply floats."""
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if line.startswith(".L_")}
    spans = []
    for n, line in enumerate(lines):
        to = re.search(r"BRA(?:\.U)?\s.*?\(?(\.L_x_\d+)\)?", line)
        if to and labels[to[1]] <= n:
            spans.append((labels[to[1]], n))
    for begin, end in spans:
        inner = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
        body = [line for line in lines[begin : end + 1] if not line.startswith(".L_")]
        text = "\n".join(body)
        if not inner and re.search(r"LDG\.\S*128", text) and re.search(r"FFMA|FMUL|HFMA", text):
            yield _loop(body)


def _loop(body: list[str]) -> Loop:
    flying: set[int] = set()  # first registers of the loads that are on their way
    most, twice = 0, False
    for line in body:
        code = re.sub(r"/\*.*?\*/", "", line).strip().rstrip(";").strip()
        load = re.search(r"LDG\.\S*128\s+R(\d+)", code)
        if load:
            twice |= int(load[1]) in flying
            flying.add(int(load[1]))
            most = max(most, len(flying))
            continue
        used = {int(n) for n in re.findall(r"\bR(\d+)\b", code)}
        flying -= {r for r in flying if used & set(range(r, r + 4))}
    return Loop(most, twice, len(body))
