"""`mollm evaluate --suite`: benchmarks of the field by name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import NO_ORIGINAL
from mollm.commands.evaluation_options import SAFETY, TOFU
from mollm.commands.results import (
    Measured,
    Place,
    default_out,
    keep_logs,
    keep_results,
    refuse_other_suite,
)
from mollm.errors import UsageError
from mollm.system.parsing import is_file
from mollm.system.terminal import progress

if TYPE_CHECKING:
    from mollm.evaluation.summary import Evaluation

_SAFE_ROWS = "PKU-Alignment/PKU-SafeRLHF"


def name_data(way: str, given: dict[str, Any]) -> None:
    """Names the sets of a suite that is measured as TOFU's files or sets of the user's are.

    Raises:
        UsageError: It lacks a judge.
    """
    if way == TOFU:
        given.setdefault("data", "locuslab/TOFU")
    elif way == SAFETY:
        if "judge" not in given:
            raise UsageError(
                "the suite safety must have a judge of replies: give one or more with --judge, "
                "such as toxicity=unitary/toxic-bert:toxic."
            )
        rows = given.pop("data", _SAFE_ROWS)
        on_hub = rows.count("/") == 1 and not Path(rows).exists()
        source = json.dumps({"path": rows, "split": "test"}) if on_hub else rows
        given |= {"forget": source, "retain": source}


def evaluate_suite(given: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Measures a model, and the original beside it, by a benchmark that fixes prompts and figures.

    Raises:
        UsageError: Its data or the retain logs cannot be read, or a model cannot be loaded.
    """
    from mollm.evaluation.field import (
        RETRAINED_AUC,
        benchmark_work,
        check_benchmark,
        load_benchmark,
        measure_benchmark,
    )
    from mollm.evaluation.relative import with_relative
    from mollm.models import loading
    from mollm.report.run_file import original_of, run_of

    name = given["suite"]
    names = given["metrics"].split(",") if "metrics" in given else None
    first = given.get("original") or original_of(given["model"])
    sources = {"result": loading.find_model(given["model"])}
    if first is not None and first != NO_ORIGINAL:
        sources["original"] = loading.find_model(first)
    wanted = check_benchmark(
        name,
        names=names,
        original="original" in sources,
        batch_size=arguments.batch_size,
        resamples=arguments.resamples,
    )
    logs: Path | None = given.get("retain_logs")
    retrained = name in RETRAINED_AUC and "privleak" in wanted
    retain_only = None if logs is None else _retain_only(logs, given, auc=retrained)
    auc = _retrained_auc(logs) if logs is not None and retrained else None
    sets = load_benchmark(name, given.get("data"), names=names, limit=given.get("limit"))
    run = run_of(given["model"])
    out = given.get("out", default_out(run))
    keep_logs(logs, out)

    def measure(place: Place) -> Measured:
        models = {
            role: loading.load(source, place.device, place.dtype)
            for role, source in sources.items()
        }
        reference = models["original"][0] if "original" in models else None
        work, found = benchmark_work(name, sets, wanted), {}
        for role, (model, tokenizer) in models.items():
            title = f"{name}, {role}"
            with progress(0 if place.quiet else work, title) as done:
                found[role] = measure_benchmark(
                    model,
                    tokenizer,
                    name,
                    sets,
                    names=names,
                    original=reference,
                    retrained_auc=auc,
                    batch_size=arguments.batch_size,
                    resamples=arguments.resamples,
                    seed=arguments.seed,
                    say=place.say,
                    done=done,
                )
        if retain_only is not None:
            found = {role: with_relative(one, retain_only) for role, one in found.items()}
        return Measured(found["result"], found.get("original"))

    keep_results(out, given, arguments, measure, run=run, original="original" in sources)
    return 0


def _retain_only(logs: Path, given: Mapping[str, Any], *, auc: bool) -> Evaluation | None:
    """The evaluation of the retain-only model; None of examples.jsonl alone, which gives an AUC."""
    from mollm.evaluation.summary import METRICS_FILE, Evaluation

    refuse_other_suite(logs, given["suite"], given.get("limit"))
    folder = logs.parent if logs.is_file() else logs
    if not auc or is_file(folder / METRICS_FILE):
        return Evaluation.read(folder)
    print(
        f"No relative figures: they need {METRICS_FILE} beside {logs}, which serves privleak.",
        file=sys.stderr,
    )
    return None


def _retrained_auc(logs: Path) -> float:
    """That of Min-40% in the evaluation of a retrained model by the same suite."""
    from mollm.evaluation.metrics import membership_auc
    from mollm.evaluation.records import read_records

    groups: dict[str, list[float]] = {"forget": [], "holdout": []}
    for record in read_records(logs):
        if record.group in groups and "min_k" in record.scores:
            groups[record.group].append(record.scores["min_k"])
    if not all(groups.values()):
        raise UsageError(
            f"retain-logs must be the examples.jsonl of a retrained model by the same suite, but "
            f"{logs} has no Min-K scores: evaluate that model first."
        )
    return membership_auc(groups["forget"], groups["holdout"])
