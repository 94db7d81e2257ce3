"""The demo over several seeds and directions: the table in the README.

    python benchmarks/demo_seeds.py

Runs `mollm demo --seed S --direction D` for every pair, one after the other, each as a user would.
A pair whose summary.json is there already is not run again, so that the script can be stopped and
taken up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from _common import ROOT, Row, print_table, provenance, results_folder, save_json

GROUPS = ("forget", "retain", "heldout", "general")


def run(seed: int, direction: str, folder: Path) -> Row:
    """The summary of one demo; its model is deleted, half a gigabyte each."""
    out = folder / f"{direction}-{seed}"
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "mollm", "demo", "--seed", str(seed)]
        subprocess.run([*command, "--direction", direction, "--out", str(out)], check=True)
        shutil.rmtree(out / "model", ignore_errors=True)
    summary: Row = json.loads((out / "summary.json").read_text())
    return summary


def row_of(summary: Row) -> Row:
    """One line of the table."""
    return {
        "direction": summary["direction"],
        "seed": summary["seed"],
        **{group: summary[f"{group}_accuracy_after"] for group in GROUPS},
        **{f"conflicts {name}": rate for name, rate in summary["conflict_rate"].items()},
        "seconds": summary["seconds"],
        "GB": summary["peak_memory_gb"],
    }


def mean_of(rows: Sequence[Row]) -> Row:
    """The mean line of one direction."""
    numbers = [key for key in rows[0] if key not in ("direction", "seed")]
    means = {key: statistics.mean(row[key] for row in rows) for key in numbers}
    return {"direction": rows[0]["direction"], "seed": "mean", **means}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes it as JSON under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--directions", nargs="+", default=["dual", "sum", "ga"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for direction in options.directions:
        mine = [row_of(run(seed, direction, options.folder)) for seed in options.seeds]
        rows += [*mine, mean_of(mine)]
    print_table(rows, "accuracy after (before: 1.0), share of conflicting steps, time, peak memory")
    path = results_folder("cpu") / "demo_seeds.json"
    save_json(path, provenance("cpu", "transformers"), rows)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
