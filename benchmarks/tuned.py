"""Does `mollm tune` find what the study has found?

    python benchmarks/tuned.py --task tofu --data FOLDER           five minutes
    python benchmarks/tuned.py --task capitals --minutes 20        what the demo forgets, of SmolLM2

The sweep begins as the command does, at the rate for a model of that size, and knows nothing of
the study. Its best run stands beside runs at rates of the study and the demo, measured in the same
way: `forgotten` of all rows to forget, `kept` of rows to retain that no run trains on, and their
harmonic mean. `behind`: how far the sweep's best is below that run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Row, print_table, provenance, results_folder, save_json
from quality import tofu

from mollm.data.chat import ChatFormat
from mollm.demo import facts, run
from mollm.demo.quiz import quiz
from mollm.models import loading
from mollm.planning.first_settings import rate_for
from mollm.training.sweep import Point, sweep

_STEPS = 20  # of `mollm tune`


@dataclass(frozen=True)
class Task:
    """A model and its rows."""

    model: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    known: Sequence[tuple[float, int]]
    """Rates and steps of the study or the demo."""


def _tofu(data: Path | None, seed: int, folder: Path) -> Task:
    if data is None:
        raise SystemExit("--data must be given for TOFU: a folder with its JSON lines.")
    case = tofu.make_case(data, seed, tofu.SMALL, torch.device("cpu"), ROOT / "build" / "models")
    records, tokenizer = tofu.records(data, seed, tofu.SMALL)
    case.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = {name: records[name] for name in ("forget", "retain")}
    known = [(rate, 20) for rate in (5e-4, 1e-3, 2e-3, 4e-3)]
    return Task(str(folder), rows, {"per_device_train_batch_size": tofu.SMALL.batch}, known)


def _capitals(data: Path | None, seed: int, folder: Path) -> Task:
    source = loading.find_model(None)
    model, tokenizer = loading.load(source, torch.device("cpu"))
    chat = ChatFormat.of(model, tokenizer)
    split, _ = run.examine(model, chat, [], random.Random(seed), print)
    score = quiz(model, chat, facts.questions_of(facts.EVERYDAY), max_new_tokens=20)
    everyday = [pair for pair, right in zip(score.pairs, score.right, strict=True) if right]
    heldout = run.Split([], split.heldout, [], split.spelling)
    rows = {
        "forget": run.forget_records(split),
        "retain": run.retain_records(split, everyday),
        "eval_retain": run.retain_records(heldout, []),
    }
    settings = {"per_device_train_batch_size": 6, "per_device_retain_batch_size": 13}
    return Task(source.name, rows, settings, [(rate, 15) for rate in (2.3e-5, 4.6e-5, 9.2e-5)])


TASKS: Mapping[str, Callable[[Path | None, int, Path], Task]] = {
    "tofu": _tofu,
    "capitals": _capitals,
}


def _row(name: str, point: Point, best: Point) -> Row:
    return {
        "run": name,
        "learning rate": point.learning_rate,
        "steps": point.steps,
        "forgotten": point.forgotten,
        "kept": point.kept,
        "score": point.score,
        "behind": point.score - best.score,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="tofu")
    parser.add_argument("--data", type=Path, help="folder with TOFU's JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[options.task](options.data, options.seed, Path(folder))
        size = loading.count_parameters(loading.find_model(task.model))
        common = {**task.settings, "use_cpu": True, "seed": options.seed}

        def tried(rate: float, steps: int, minutes: float) -> Any:
            settings = {**common, "learning_rate": rate, "max_steps": steps}
            return sweep(task.model, task.data, settings, minutes=minutes, say=print)

        found = tried(rate_for(size, adapter=False), _STEPS, options.minutes)
        best = found.best
        assert best is not None, "the first run ended"
        rows = [_row(f"mollm tune, {found.seconds:.0f} s", best, best)]
        for rate, steps in task.known:
            end = tried(rate, steps, 1e-9).best  # one run is always made
            assert end is not None, f"a run at {rate:g} ended"
            rows.append(_row("known", end, best))
    print_table(rows, f"{options.task}, seed {options.seed}; kept: of {found.held_out}")
    path = options.json or results_folder("cpu") / f"tuned-{options.task}.json"
    save_json(path, provenance("cpu"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
