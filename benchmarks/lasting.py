"""Does it stay forgotten? Ten forgotten rows are taught again, and the others are asked for.

    python benchmarks/lasting.py --data FOLDER             TOFU on a small Llama, five seeds
    python benchmarks/lasting.py --data FOLDER --seeds 0 --settings "mollm, relearning"
    python benchmarks/lasting.py --data FOLDER --settings "mollm, 20 steps, own retain data"

Every run is one of MOLLMTrainer. Shares are of the original's likelihood: `forget` of the rows to
forget, `kept` of authors that training never touched, `outside` of other kinds of question; and
`others` of the forgotten rows after ten steps of AdamW on ten of them, at either learning rate. The
model that never learnt the rows stands beside them. A run that is in the results folder is not run
again, so that the script can be stopped and taken up.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Row, print_table, provenance, results_folder, save_json
from quality import tofu
from quality.case import Case, likelihood, measure, share
from quality.endings import learn_ten
from quality.summary import interval
from tqdm import tqdm

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.sets import AUTO

RATES = (5e-4, 1.5e-3)
"""Of whoever teaches the ten rows again."""
_RETAIN = "retain_dataset"
_SHORT = {"method": "mollm", "max_steps": 20}
_LONG = {"learning_rate": 3e-4, "max_steps": 240}
_RELEARNING = {"relearn_steps": 3, **_LONG}
SETTINGS: Mapping[str, dict[str, Any]] = {
    "mollm, 20 steps": {**_SHORT, "learning_rate": 1e-3},
    "mollm, 20 steps, own retain data": {**_SHORT, "learning_rate": 1e-3, _RETAIN: AUTO},
    "mollm, 20 steps at 2e-3, own retain data": {**_SHORT, "learning_rate": 2e-3, _RETAIN: AUTO},
    "mollm, 20 steps at 4e-3, own retain data": {**_SHORT, "learning_rate": 4e-3, _RETAIN: AUTO},
    "mollm": {"method": "mollm", **_LONG},
    "sum": {"method": "sum", **_LONG},
    "npo": {"method": "npo", **_LONG},
    "simnpo": {"method": "simnpo", **_LONG},
    "graddiff": {"method": "graddiff", **_LONG},
    "mollm, relearning": {"method": "mollm", **_RELEARNING},
    "mollm, relearning gently": {"method": "mollm", **_RELEARNING, "learning_rate": 2e-4},
    "sum, relearning": {"method": "sum", **_RELEARNING},
    "npo, relearning": {"method": "npo", **_RELEARNING},
    "simnpo, relearning": {"method": "simnpo", **_RELEARNING},
    "graddiff, relearning": {"method": "graddiff", **_RELEARNING},
}
"""By name, what a MOLLMConfig is given, and where the data to retain are not TOFU's."""
_ENDS = ("original", "never learnt it")
_FIGURES = ("forget", "kept", "outside", *(f"others at {rate:g}" for rate in RATES), "utility")


def unlearned(case: Case, data: Path, seed: int, settings: Mapping[str, Any]) -> tuple[Any, Row]:
    """A copy of the case's model after a run of the trainer, and what the run says of itself."""
    records, tokenizer = tofu.records(data, seed, tofu.SMALL)
    retain = settings.get(_RETAIN, records["retain"])
    settings = {name: value for name, value in settings.items() if name != _RETAIN}
    with tempfile.TemporaryDirectory() as folder:
        trainer = MOLLMTrainer(
            copy.deepcopy(case.model),
            MOLLMConfig(
                output_dir=folder,
                use_cpu=True,
                compute_dtype="float32",
                per_device_train_batch_size=tofu.SMALL.batch,
                weight_decay=0.0,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=seed,
                **settings,
            ),
            forget_dataset=records["forget"],
            retain_dataset=retain,
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
    history = trainer.history
    conflicts = [any(record.conflicts.values()) for record in history]
    return trainer.model, {
        "seconds": round(time.perf_counter() - started, 1),
        "conflicts": sum(conflicts) / len(conflicts),
        "failed": trainer.stop_reason,
    }


def judged(case: Case, model: Any) -> Row:
    """What is left and what comes back."""
    left = measure(case, model, case.groups)
    row: Row = {"forget": left["forget"], "kept": left["heldout"], "outside": left["outside"]}
    known = likelihood(case, case.model, case.others)
    for rate in RATES:
        taught = copy.deepcopy(model)
        learn_ten(case, taught, rate)
        row[f"others at {rate:g}"] = share(likelihood(case, taught, case.others), known)
    figures = case.figures(model)
    return row | {"utility": figures["model_utility"], "forget quality": figures["forget_quality"]}


def table(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, with half of their 95% intervals."""
    lines = []
    for name in dict.fromkeys(row["settings"] for row in rows):
        mine = [row for row in rows if row["settings"] == name]
        line: Row = {"settings": name, "seeds": len(mine)}
        for figure in _FIGURES:
            values = [row[figure] for row in mine]
            reach = interval(values)
            middle = f"{statistics.mean(values):.3f}"
            line[figure] = middle if reach is None else f"{middle} ±{(reach[1] - reach[0]) / 2:.3f}"
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's JSON lines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="where the runs are kept")
    options = parser.parse_args(argv)
    cpu, cache = torch.device("cpu"), ROOT / "build" / "models"
    path = options.json or results_folder("cpu") / "lasting.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def keep(row: Row) -> None:
        rows.append(row)
        save_json(path, provenance("cpu"), rows)

    todo = [
        (seed, name)
        for seed in options.seeds
        for name in (*_ENDS, *options.settings)
        if not any((row["seed"], row["settings"]) == (seed, name) for row in rows)
    ]
    made: dict[int, Case] = {}
    for seed, name in tqdm(todo, unit="run", dynamic_ncols=True, disable=not todo):
        if seed not in made:
            made = {seed: tofu.make_case(options.data, seed, tofu.SMALL, cpu, cache)}
        case = made[seed]
        run: Row = {}
        if name == _ENDS[0]:
            model: Any = case.model
        elif name == _ENDS[1]:
            model = tofu.retain_only(seed, tofu.SMALL, case, cache)
        else:
            model, run = unlearned(case, options.data, seed, SETTINGS[name])
        keep({"seed": seed, "settings": name, **judged(case, model), **run})
    print_table(table(rows), f"TOFU on a small Llama, {', '.join(map(str, options.seeds))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
