"""Shared by the benchmarks: where a figure comes from, paired timing, tables, files."""

from __future__ import annotations

import gc
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mollm.system import machine
from mollm.system.tables import aligned

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
UNMEASURED = "the inputs"


def device_name(device: str) -> str:
    """What a reader calls the device: the GPU's name, or the CPU's with its number of threads."""
    return machine.device_name(torch.device(device))


def provenance(device: str, *packages: str) -> Row:
    """Device, date, versions, commit and command: what every figure carries."""
    known = os.environ.get("MOLLM_COMMIT")  # of a copy without .git
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    # Folders of this machine are nobody else's.
    words = ["FOLDER" if os.path.isabs(word) else word for word in sys.argv[1:]]
    return {
        "device": device_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": machine.versions("triton", *packages),
        "commit": known or commit or "unknown",
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
    }


def elements_that_fit(device: str, bytes_each: int) -> int:
    """P of the large rows where every element takes so many bytes in all: 1e8 on a CPU, on a GPU
    what fits into 80% of its free memory, in one digit and at most 1e9."""
    if device != "cuda":
        return 10**8
    free, _ = torch.cuda.mem_get_info()
    fitting = min(10**9, int(0.8 * free / bytes_each))
    digit = 10 ** int(math.log10(fitting))
    return fitting // digit * digit


def free_memory() -> None:
    """Gives back what an OutOfMemoryError left behind."""
    gc.collect()
    torch.cuda.empty_cache()


def rows_or_none(measure: Callable[[], list[Row]], what: Row) -> list[Row]:
    """The rows that were measured, or one that says of what the inputs alone did not fit."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        free_memory()
    return [{**what, "out of memory": UNMEASURED}]


def _seconds(call: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    *,
    rounds: int = 7,
    warmup: int = 1,
    peers: Collection[str] = (),
    reasons: dict[str, str] | None = None,
) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that drift hits all alike.

    NaN for a call that ran out of memory, or a peer's that failed; the others go on without it.

    Args:
        peers: names of calls that are not ours.
        reasons: why a peer failed is written here, by its name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: set[str] = set()
    for turn in range(-warmup, rounds):
        for name in [n for n in calls if n not in failed]:
            try:
                seconds = _seconds(calls[name], device)
            except torch.cuda.OutOfMemoryError:
                failed.add(name)
                continue
            except Exception as error:
                if name not in peers:
                    raise
                failed.add(name)
                if reasons is not None:
                    reasons[name] = why(error)
                continue
            if turn >= 0:
                times[name].append(seconds)
        if failed:
            free_memory()
    return {
        name: math.nan if name in failed else statistics.median(values)
        for name, values in times.items()
    }


def most_allocated(call: Callable[[], object]) -> int:
    """The most bytes that Torch has allocated at once on the CPU during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    results: Any = run.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def why(error: Exception) -> str:
    """An error in one short line."""
    first = (str(error).strip() or "no words").splitlines()[0]
    return f"{type(error).__name__}: {first[:120]}"


def print_table(rows: Sequence[Row], title: str) -> None:
    """The rows as an aligned table; numbers with three digits."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    header, *lines = aligned([columns, *cells], left=0)
    print("\n".join([f"\n{title}", header, "-" * len(header), *lines]))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def results_folder(device: str) -> Path:
    """benchmarks/results/<device>, made where it is missing."""
    name = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    folder = ROOT / "benchmarks" / "results" / "-".join(filter(None, name.split("-")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def title_of(source: Row) -> str:
    return f"{source['device']}, {source['date']}, torch {source['versions']['torch']}"


def save_json(path: Path, source: Row, rows: Sequence[Row]) -> None:
    """Provenance and rows as JSON; numbers that are not finite as text."""
    plain = [
        {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    path.write_text(json.dumps({**source, "rows": plain}, indent=1) + "\n")


def save_plot(
    plot: Callable[[Sequence[Row], Path, str], None], path: Path, source: Row, rows: Sequence[Row]
) -> None:
    """The rows' figure beside their JSON, where matplotlib is installed; says what was written."""
    print(f"\nwritten: {path}")
    measured = [row for row in rows if row.get("out of memory") != UNMEASURED]
    if measured and find_spec("matplotlib"):
        plot(measured, path.with_suffix(".png"), title_of(source))
        print(f"written: {path.with_suffix('.png')}")
