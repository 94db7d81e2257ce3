"""The demo's experiment over several seeds and methods: the tables of docs/demo.md.

    python benchmarks/demo_seeds.py

One process loads the model once and asks once per seed; every method then starts from the
original weights and from the same batches. A pair of seed and method that is in the folder
already is not run again, so that the script can be stopped and taken up.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import ROOT, Row, print_table, provenance, results_folder, save_json
from transformers import PreTrainedModel

from mollm.data.chat import ChatFormat
from mollm.demo import run
from mollm.demo.quiz import quiz
from mollm.demo.report import conflict_rates
from mollm.demo.settings import DemoSettings
from mollm.models import loading
from mollm.system import machine
from mollm.system.units import GIB

GROUPS = ("forget", "retain", "heldout", "general")
METHODS = ("mollm", "project", "sum", "ga", "dual")


def run_seed(
    model: PreTrainedModel, chat: ChatFormat, seed: int, methods: Sequence[str], folder: Path
) -> None:
    """Runs every method for one seed that has no result yet."""
    todo = [d for d in methods if not (folder / f"{d}-{seed}.json").exists()]
    if not todo:
        return
    original = {name: value.clone() for name, value in model.state_dict().items()}
    split, before = run.examine(model, chat, [], random.Random(seed), print)
    for method in todo:
        model.load_state_dict(original)
        settings = DemoSettings(seed=seed, method=method)
        with tempfile.TemporaryDirectory() as scratch:
            trainer, seconds = run.train(model, chat, split, settings, Path(scratch), print)
        history = trainer.history
        del trainer
        gc.collect()  # with it go its copies of the model
        after = {group: quiz(model, chat, score.questions) for group, score in before.items()}
        row: Row = {
            "method": method,
            "seed": seed,
            **{group: after[group].accuracy for group in GROUPS},
            **{f"conflicts {name}": rate for name, rate in conflict_rates(history).items()},
            "steps": settings.steps,
            "training s": round(seconds, 1),
            "GiB": round(machine.peak_memory(torch.device("cpu")) / GIB, 2),
        }
        print_table([row], f"seed {seed}")
        (folder / f"{method}-{seed}.json").write_text(json.dumps(row))
    model.load_state_dict(original)


def mean_of(rows: Sequence[Row]) -> Row:
    """The mean line of one method."""
    numbers = [key for key in rows[0] if key not in ("method", "seed")]
    means = {key: statistics.mean(row[key] for row in rows) for key in numbers}
    return {"method": rows[0]["method"], "seed": "mean", **means}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes it as JSON under benchmarks/results/<device>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, tokenizer = loading.load(loading.find_model(None), torch.device("cpu"))
    chat = ChatFormat.of(model, tokenizer)
    for seed in options.seeds:
        run_seed(model, chat, seed, options.methods, options.folder)
    rows: list[Row] = []
    for method in options.methods:
        paths = [options.folder / f"{method}-{seed}.json" for seed in options.seeds]
        mine = [json.loads(path.read_text()) for path in paths]
        rows += [*mine, mean_of(mine)]
    print_table(rows, "accuracy after (before: 1.0), share of conflicting steps, time, peak memory")
    path = results_folder("cpu") / "demo_seeds.json"
    save_json(path, provenance("cpu", "transformers"), rows)
    print(f"\nwritten: {path}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
