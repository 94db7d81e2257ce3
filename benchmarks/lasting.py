"""Does it stay forgotten? Ten forgotten rows are taught again, and the others are asked for.

    python benchmarks/lasting.py --data FOLDER             TOFU on a small Llama, five seeds
    python benchmarks/lasting.py --data FOLDER --seeds 0 --settings "mollm, relearning"
    python benchmarks/lasting.py --data FOLDER --settings "mollm, 20 steps, own retain data"
    python benchmarks/lasting.py --task tofu-authors --data FOLDER    more authors to retain
    python benchmarks/lasting.py --task knowledge          thirty things that SmolLM2 knows
    python benchmarks/lasting.py --task facts-4            synthetic facts, an objective a domain

Every run is one of MOLLMTrainer, but for the synthetic facts, which no language model reads. Shares
are of the original's likelihood: `forget` of the rows to forget, `kept` of authors or facts that
training never touched, `outside` of other kinds of question; and `others` of the forgotten rows
after ten steps of AdamW on ten of them, at either learning rate. Beside them stands the model that
never learnt the rows; of what SmolLM2 knows there is none, but shares of questions that are
answered, `general` those about other things. A run that is in the results folder is not run again,
so that the script can be stopped and taken up.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _common import ROOT, Row, print_table, provenance, results_folder, save_json
from quality import facts, ideas, knowledge, lasting_facts, tofu
from quality.case import TrainerCase, likelihood, measure, share
from quality.endings import learn_ten
from quality.summary import interval
from tqdm import tqdm

from mollm import MOLLMConfig, MOLLMTrainer
from mollm.data.records import Record
from mollm.data.sets import AUTO
from mollm.methods import METHODS

_SHORT = {"method": "mollm", "max_steps": 20}
_BLOCKS = {"optimizer_options": {"gradient_memory": "streamed", "gram": "blocks"}}
_LONG = {"learning_rate": 3e-4, "max_steps": 240}
_RELEARNING = {"relearn_steps": 3, **_LONG}
_GENTLY = {**_RELEARNING, "learning_rate": 2e-4}
_WRONG_ANSWERS = 6.7
"""Nats a token: what TOFU's wrong answers to the forget questions cost the original."""
_KNOWLEDGE = {
    "method": "mollm",
    "learning_rate": 3e-5,
    "max_steps": 60,
    "per_device_retain_batch_size": 12,
}
_FEW_STEPS = {"method": "mollm", "learning_rate": 5e-5, "max_steps": 20}
_RELEARN_KNOWLEDGE = {"relearn_steps": 2, "relearn_lr": 1e-4}
_ENDS = ("original", "never learnt it")

Records = Mapping[str, Sequence[Record]]


def _everyday_apart(records: Records) -> Mapping[str, Any]:
    """Facts and everyday questions to retain, each with an objective of its own."""
    return {name: records[name] for name in ("facts", "everyday")}


_OWN_WORDS = {
    **_KNOWLEDGE,
    "learning_rate": 4e-5,
    "relearn_steps": 2,
    "relearn_lr": 2e-4,
    "trainable_parameters": [".mlp."],
    "also": "said",
    "per_device_train_batch_size": 12,
    "per_device_retain_batch_size": 6,
    "retain": _everyday_apart,
}


@dataclass(frozen=True)
class Task:
    """What is forgotten, by whom, and how."""

    title: str
    start: Callable[[argparse.Namespace, int], TrainerCase]
    settings: Mapping[str, Mapping[str, Any]]
    """Of a run, by name; `also` names further records to forget, `retain` is what to retain, or
    what makes it of the records to retain."""
    rates: tuple[float, ...]
    """Of whoever teaches the ten rows again."""
    figures: tuple[str, ...]
    """Columns of the table, with those of the same name at each rate."""
    ends: tuple[str, ...] = _ENDS
    """Models that stand beside those of the runs."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run."""
    run: Callable[[TrainerCase, dict[str, Any], int], tuple[Any, Row]] = field(
        default=lambda *given: unlearned(*given)
    )
    """A copy of the case's model after a run, and what the run says of itself."""


def _tofu(options: argparse.Namespace, seed: int, size: tofu.Size = tofu.SMALL) -> TrainerCase:
    if options.data is None:
        raise SystemExit("--data must be given for TOFU: a folder with its JSON lines.")
    cpu, cache = torch.device("cpu"), ROOT / "build" / "models"
    case = tofu.make_case(options.data, seed, size, cpu, cache)
    records, tokenizer = tofu.records(options.data, seed, size)
    return TrainerCase(case, records, tokenizer, lambda: tofu.retain_only(seed, size, case, cache))


def _and_own_texts(records: Records) -> Mapping[str, Any]:
    """What to retain, and what the original itself says of its own accord."""
    return {"given": records["retain"], "own": AUTO}


def _of_authors(count: int, records: Records) -> Sequence[Record]:
    """The rows to retain of the first authors."""
    return records["retain"][: count * tofu.AUTHOR]


def _knowledge(options: argparse.Namespace, seed: int) -> TrainerCase:
    return knowledge.make_case(seed, torch.device("cpu"), ROOT / "build" / "models")


def _facts(objectives: int, seed: int) -> TrainerCase:
    case = facts.make_case(objectives, seed)
    return TrainerCase(case, {}, None, lambda: facts.never_learnt(objectives, seed))


_FACTS = Task(
    "Synthetic facts",
    lambda options, seed: _facts(int(options.task.removeprefix("facts-")), seed),
    {
        f"{method}{name}": {"method": method, **settings}
        for method in ("mollm", "sum")
        for name, settings in {
            ", 60 steps": {"max_steps": 60, "learning_rate": 1e-3},
            "": {"max_steps": 240, "learning_rate": 1e-3},
            ", relearning": {
                "max_steps": 240,
                "learning_rate": 1e-3,
                "relearn_steps": 3,
                "relearn_lr": 3e-3,
            },
        }.items()
    },
    (1e-3, 3e-3),
    ("forget", "kept", "outside", "others", "conflicts"),
    run=lambda started, settings, seed: lasting_facts.unlearned(started.case, settings, seed),
)

TASKS = {
    **{f"facts-{count}": _FACTS for count in (2, 4, 8)},
    "tofu": Task(
        "TOFU on a small Llama",
        _tofu,
        {
            "mollm, 20 steps": {**_SHORT, "learning_rate": 1e-3},
            "mollm, 20 steps, a Gram matrix a block": {**_SHORT, **_BLOCKS, "learning_rate": 1e-3},
            **{
                f"mollm, 20 steps{at}, own retain data": {
                    **_SHORT,
                    "learning_rate": rate,
                    "retain": AUTO,
                }
                for at, rate in (("", 1e-3), (" at 2e-3", 2e-3), (" at 4e-3", 4e-3))
            },
            "mollm": {"method": "mollm", **_LONG},
            "mollm, a Gram matrix a block": {"method": "mollm", **_LONG, **_BLOCKS},
            "sum": {"method": "sum", **_LONG},
            "npo": {"method": "npo", **_LONG},
            "simnpo": {"method": "simnpo", **_LONG},
            "graddiff": {"method": "graddiff", **_LONG},
            "mollm, relearning": {"method": "mollm", **_RELEARNING},
            "mollm, relearning gently": {"method": "mollm", **_GENTLY},
            "sum, relearning": {"method": "sum", **_RELEARNING},
            "sum, relearning gently": {"method": "sum", **_GENTLY},
            "npo, relearning": {"method": "npo", **_RELEARNING},
            "simnpo, relearning": {"method": "simnpo", **_RELEARNING},
            "graddiff, relearning": {"method": "graddiff", **_RELEARNING},
            "gently, β₂ = 0": {"method": "mollm", "adam_beta2": 0.0, **_GENTLY},
            "gently, margin": {"method": "margin", **_GENTLY},
            "margin at 1e-4": {"method": "margin", **_GENTLY, "learning_rate": 1e-4},
            "gently, floor": {
                "method": "floor",
                "method_options": {"floor": _WRONG_ANSWERS},
                **_GENTLY,
            },
            "gently, paraphrases": {"method": "mollm", "also": "rephrased", **_GENTLY},
            "gently, pcd": {"method": "pcd", **_GENTLY},
            "gently, own texts": {"method": "mollm", "retain": _and_own_texts, **_GENTLY},
        },
        (5e-4, 1.5e-3),
        ("forget", "kept", "outside", "others", "utility"),
        common={"per_device_train_batch_size": tofu.SMALL.batch},
    ),
    "tofu-authors": Task(
        "TOFU on a small Llama that knows sixteen authors to retain",
        lambda options, seed: _tofu(options, seed, replace(tofu.SMALL, retain=16)),
        {
            f"gently, {count} authors": {
                "method": "mollm",
                "retain": partial(_of_authors, count),
                **_GENTLY,
            }
            for count in (4, 8, 16)
        }
        | {
            "16 authors": {
                "method": "mollm",
                "retain": partial(_of_authors, 16),
                **_RELEARNING,
            }
        },
        (5e-4, 1.5e-3),
        ("forget", "kept", "outside", "others", "utility"),
        common={"per_device_train_batch_size": tofu.SMALL.batch},
    ),
    "knowledge": Task(
        "What SmolLM2 knows",
        _knowledge,
        {
            "mollm, 20 steps": _FEW_STEPS,
            "mollm, 20 steps, relearning": {**_FEW_STEPS, **_RELEARN_KNOWLEDGE},
            "mollm": _KNOWLEDGE,
            "mollm, relearning": {**_KNOWLEDGE, **_RELEARN_KNOWLEDGE},
            "mollm, relearning, gently": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "learning_rate": 2e-5,
            },
            "mollm, relearning, everyday apart": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "per_device_retain_batch_size": 6,
                "retain": _everyday_apart,
            },
            "mollm, relearning, everyday apart, gently": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "learning_rate": 2e-5,
                "per_device_retain_batch_size": 6,
                "retain": _everyday_apart,
            },
            "mollm, relearning, everyday apart, preferred": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "per_device_retain_batch_size": 6,
                "retain": _everyday_apart,
                "preferences": {"retain_everyday": 4},
            },
            "mollm, relearning, everyday apart, MLPs alone": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "relearn_lr": 3e-4,
                "trainable_parameters": [".mlp."],
                "per_device_retain_batch_size": 6,
                "retain": _everyday_apart,
            },
            "mollm, relearning, everyday apart, MLPs alone at 5e-5": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "learning_rate": 5e-5,
                "trainable_parameters": [".mlp."],
                "per_device_retain_batch_size": 6,
                "retain": _everyday_apart,
            },
            "mollm, relearning, everyday apart, MLPs alone, own words": _OWN_WORDS,
            "mollm, relearning, everyday apart, MLPs alone, own words, 50 steps": {
                **_OWN_WORDS,
                "max_steps": 50,
            },
            "mollm, relearning, everyday and own texts apart": {
                **_KNOWLEDGE,
                **_RELEARN_KNOWLEDGE,
                "per_device_retain_batch_size": 4,
                "retain": lambda records: {**_everyday_apart(records), "own": AUTO},
            },
        },
        (5e-5,),
        (
            *("forget", "kept", "outside"),
            *(f"{name} answered" for name in ("forget", "general", "further", "others")),
        ),
        (),
        {"per_device_train_batch_size": 6},
    ),
}


def unlearned(started: TrainerCase, settings: dict[str, Any], seed: int) -> tuple[Any, Row]:
    """A copy of the case's model after a run of the trainer, and what the run says of itself."""
    forget = [*started.records["forget"], *started.records.get(settings.pop("also", ""), ())]
    model = copy.deepcopy(started.case.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    retain = settings.pop("retain", started.records["retain"])
    if callable(retain):
        retain = retain(started.records)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MOLLMTrainer(
            model,
            MOLLMConfig(
                output_dir=folder,
                use_cpu=True,
                compute_dtype="float32",
                weight_decay=0.0,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=seed,
                **settings,
            ),
            forget_dataset=forget,
            retain_dataset=retain,
            processing_class=started.tokenizer,
        )
        began = time.perf_counter(), time.process_time()
        trainer.train()
    for p in trained:  # whoever teaches the ten rows again trains all
        p.requires_grad_(True)
    history = trainer.history
    conflicts = [any(record.conflicts.values()) for record in history]
    return trainer.model, {
        "seconds": round(time.perf_counter() - began[0], 1),
        "CPU seconds": round(time.process_time() - began[1], 1),
        "conflicts": sum(conflicts) / len(conflicts),
        "failed": trainer.stop_reason,
    }


def judged(task: Task, started: TrainerCase, model: Any) -> Row:
    """What is left and what comes back."""
    case = started.case
    left = measure(case, model, case.groups)
    row: Row = {"forget": left["forget"], "kept": left["heldout"], "outside": left["outside"]}
    known = likelihood(case, case.model, case.others)
    row |= started.answered(model)
    for rate in task.rates:
        taught = copy.deepcopy(model)
        learn_ten(case, taught, rate)
        row[f"others at {rate:g}"] = share(likelihood(case, taught, case.others), known)
        row |= {f"{k} at {rate:g}": value for k, value in started.answered(taught).items()}
    figures = case.figures(model)
    named = {"utility": "model_utility", "forget quality": "forget_quality"}
    return row | {name: figures[figure] for name, figure in named.items() if figure in figures}


def table(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, with half of their 95% intervals."""
    lines = []
    for name in dict.fromkeys(row["settings"] for row in rows):
        mine = [row for row in rows if row["settings"] == name]
        line: Row = {"settings": name, "seeds": len(mine)}
        for figure in dict.fromkeys(name for row in mine for name in row):
            if figure.partition(" at ")[0] not in task.figures:
                continue
            values = [row[figure] for row in mine if figure in row]
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
    parser.add_argument("--task", choices=list(TASKS), default="tofu")
    parser.add_argument("--data", type=Path, help="folder with TOFU's JSON lines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", help="by default all of the task")
    parser.add_argument("--json", type=Path, help="where the runs are kept")
    options = parser.parse_args(argv)
    task = TASKS[options.task]
    chosen = options.settings or list(task.settings)
    if unknown := set(chosen) - set(task.settings):
        parser.error(f"--settings: {unknown} not among {list(task.settings)}")
    file = "lasting.json" if options.task == "tofu" else f"lasting-{options.task}.json"
    path = options.json or results_folder("cpu") / file
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def keep(row: Row) -> None:
        rows.append(row)
        save_json(path, provenance("cpu"), rows)

    todo = [
        (seed, name)
        for seed in options.seeds
        for name in (*task.ends, *chosen)
        if not any((row["seed"], row["settings"]) == (seed, name) for row in rows)
    ]
    made: dict[int, TrainerCase] = {}
    for seed, name in tqdm(todo, unit="run", dynamic_ncols=True, disable=not todo):
        if seed not in made:
            made = {seed: task.start(options, seed)}
        started = made[seed]
        run: Row = {}
        if name == _ENDS[0]:
            model: Any = started.case.model
        elif name == _ENDS[1]:
            assert started.never is not None, "a task with this end has such a model"
            model = started.never()
        else:
            with mock.patch.dict(METHODS, ideas.IDEAS):
                settings = {**task.common, **task.settings[name]}
                model, run = task.run(started, settings, seed)
        keep({"seed": seed, "settings": name, **judged(task, started, model), **run})
    print_table(table(task, rows), f"{task.title}, {', '.join(map(str, options.seeds))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
