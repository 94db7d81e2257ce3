"""Does it forget well? Every method on the same tasks, with the same budget.

    python benchmarks/unlearning_quality.py --quick                         a look, facts only
    python benchmarks/unlearning_quality.py --tasks facts tofu --data FOLDER
    python benchmarks/unlearning_quality.py --tasks tofu-full capitals-full --data FOLDER   on a GPU

Tasks: `facts`, synthetic facts with 2 to 8 objectives; `tofu`, TOFU forget10 on a small Llama;
`capitals`, the demo's task on SmolLM2, some minutes a run; `tofu-full`, all of TOFU on SmolLM2,
which learns it first, and `capitals-full`, every method and learning rate, both for a GPU. A method
runs at every learning rate of the task's sweep; what counts is the area under "kept, held out"
against "forgotten" along the run at the best of them. A run that is in the results folder is not
run again, so that the script can be stopped and taken up, and be called for some tasks, methods or
seeds at a time; tables and study.md are made of all runs in the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import ROOT, provenance, results_folder, save_json
from _common import print_table as print_rows
from quality import checks, plan, report, summary
from quality.endings import ending
from quality.runs import Row, RunFile, method_of, unlearned
from tqdm import tqdm

from mollm.errors import UsageError
from mollm.system.machine import find_device


def run_all(
    options: argparse.Namespace, tasks: Sequence[str], means: plan.Means, file: RunFile
) -> None:
    """Runs what is not in the file yet; a case is made once for its seed."""
    todo = [
        key
        for task in tasks
        for key in plan.keys(task, options.seeds, options.methods, options.quick)
        if not file.has(key)
    ]
    about = _about(means)
    case, made = None, None
    with tqdm(todo, unit="run", dynamic_ncols=True, mininterval=1, disable=not todo) as bar:
        for key in bar:
            bar.set_postfix_str(f"{key['task']} {key['method']} seed {key['seed']}")
            if made != (key["task"], key["seed"]):
                made, case = (key["task"], key["seed"]), None  # the earlier one makes room
                case = plan.make_case(*made, means)
            assert case is not None, "a case is made before its first run"
            how = {name: key[name] for name in ("lr", "steps", "warmup", "seed")}
            model, row = unlearned(case, method_of(key["method"]), **how)
            row["end"] = ending(case, model, plan.budget(key["task"], options.quick).relearning_lr)
            file.add({**key, **case.facts, "objectives": list(case.objectives), **about, **row})


def _about(means: plan.Means) -> Row:
    """Where a run comes from."""
    source = provenance(means.device.type)
    named = {name: source[name] for name in ("command", "commit", "date")}
    return {**named, "device": means.device.type}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing; prints the tables, writes JSON, figures and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = [*plan.KINDS, *plan.tasks_of(["facts"], quick=False)]
    parser.add_argument("--tasks", nargs="+", choices=kinds, default=["facts"])
    parser.add_argument("--data", type=Path, help="the folder with TOFU's JSON lines")
    parser.add_argument(
        "--model", help="instead of SmolLM2: a model folder, .gguf file or hub name"
    )
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(plan.ALL)}; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="one learning rate, few steps")
    parser.add_argument(
        "--checks",
        nargs="*",
        choices=list(checks.OWN),
        help="checks that need further runs, 2 and 21 for each seed; without a name both",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a Torch device"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument(
        "--docs", type=Path, help="where study.md is written; its JSON then to benchmarks/results"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks = plan.tasks_of(options.tasks, options.quick)
    name = "quick" if options.quick else "runs"
    file = RunFile(options.folder / f"{name}.jsonl")
    own = RunFile(options.folder / f"{name}-of-checks.jsonl")
    try:
        means = plan.Means(
            options.data,
            options.model,
            find_device(options.device),
            options.folder / "models",
            options.quick,
        )
        for method in options.methods or ():
            method_of(method)
        run_all(options, tasks, means, file)
        if options.checks is not None:
            runs, _ = plan.of_tables_and_choice(file.rows, options.quick)
            wanted = options.checks or checks.OWN
            checks.run(tasks, wanted, options.seeds, means, runs, own, about=_about(means))
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs, of_choice = plan.of_tables_and_choice(file.rows, options.quick)
    candidates = summary.choice(of_choice)
    found = checks.read(runs, own, options.quick)
    tables = {task: summary.table(runs, task) for task in plan.all_tasks(runs)}
    tables = {task: lines for task, lines in tables.items() if lines}
    for task, lines in tables.items():
        print_rows([summary.printable(line) for line in lines], task)
        print(summary.verdict(runs, task))
    for check in found:
        print(f"\n{check.name}, {check.task}: {check.sentence}")
    source = provenance(means.device.type, "transformers")
    folder = results_folder(means.device.type) if options.docs else options.folder
    rows = [{"task": task, **line} for task, lines in tables.items() for line in lines]
    rows += [
        {"check": check.name, "task": check.task, "sentence": check.sentence, **check.data}
        for check in found
    ]
    rows += [{"choice": line} for line in candidates]
    save_json(folder / "unlearning_quality.json", source, rows)
    made = [*runs, *of_choice, *own.rows]
    report.write(options.docs or options.folder, tables, candidates, found, runs, made, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
