"""`mollm evaluate --suite`: benchmarks of the field by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mollm.commands.arguments import NO_ORIGINAL
from mollm.commands.results import (
    add_to_report,
    default_out,
    keep_logs,
    place_of,
    staged_results,
    tell,
    write_about,
)
from mollm.errors import UsageError, did_you_mean
from mollm.system.terminal import progress

_TOFU, _SAFETY = "tofu", "safety"
_SAFE_ROWS = "PKU-Alignment/PKU-SafeRLHF"
_NOT_HERE = (
    "forget",
    "retain",
    "holdout",
    "forget_split",
    "judge",
    "judge_template",
    "benchmarks",
    "system_prompt",
    "chat_template_kwargs",
    "prompt_format",
    "long_rows",
)
"""What a suite that fixes its prompts and its figures has no use for."""
_SETS = {
    _TOFU: ("forget", "retain", "holdout"),
    _SAFETY: ("forget", "retain", "holdout", "forget_split"),
}
"""Of suites that are measured as sets of the user's are: what would name other sets."""


def known_data(given: dict[str, Any]) -> bool:
    """Whether a suite is measured as TOFU's files or forget and retain sets are; then names these.

    Raises:
        UsageError: There is no such suite, it lacks a judge, or other sets are given.
    """
    from mollm.evaluation.field import BENCHMARKS

    name = given["suite"]
    known = (_TOFU, _SAFETY, *BENCHMARKS)
    if name not in known:
        raise UsageError(
            f"suite must be one of {', '.join(known)}, but got {name!r}{did_you_mean(name, known)}"
        )
    for option in _SETS.get(name, ()):
        if option in given:
            raise UsageError(
                f"{option.replace('_', '-')} must be left out with the suite {name}, whose sets "
                f"are its own, but got {given[option]!r}."
            )
    if name == _TOFU:
        given.setdefault("data", "locuslab/TOFU")
    elif name == _SAFETY:
        if "judge" not in given:
            raise UsageError(
                "the suite safety must have a judge of replies: give one or more with --judge, "
                "such as toxicity=unitary/toxic-bert:toxic."
            )
        rows = given.pop("data", _SAFE_ROWS)
        on_hub = rows.count("/") == 1 and not Path(rows).exists()
        source = json.dumps({"path": rows, "split": "test"}) if on_hub else rows
        given.setdefault("forget", source)
        given.setdefault("retain", source)
    return name in (_TOFU, _SAFETY)


def evaluate_suite(given: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Measures a model, and the original beside it, by a benchmark that fixes prompts and figures.

    Raises:
        UsageError: An option does not go with it, its data are absent, or a model cannot be loaded.
    """
    from mollm.evaluation.field import (
        RETRAINED_AUC,
        benchmark_work,
        check_benchmark,
        load_benchmark,
        measure_benchmark,
    )
    from mollm.models import loading
    from mollm.report.run_file import original_of, run_of

    name = given["suite"]
    for option in _NOT_HERE:
        if option in given:
            raise UsageError(
                f"{option.replace('_', '-')} must be left out with the suite {name}, which fixes "
                f"its prompts and figures, but got {given[option]!r}."
            )
    names = given["metrics"].split(",") if "metrics" in given else None
    if "retain_logs" in given and name not in RETRAINED_AUC:
        raise UsageError(
            f"retain-logs must be left out with the suite {name}, none of whose figures compares "
            f"with a retrained model, but got {given['retain_logs']}."
        )
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
    retrained = _retrained_auc(given.get("retain_logs"))
    sets = load_benchmark(name, given.get("data"), names=names, limit=given.get("limit"))
    run = run_of(given["model"])
    out = given.get("out", default_out(run))
    keep_logs(given.get("retain_logs"), out)
    place = place_of(arguments)
    with staged_results(out, original="original" in sources) as (folder, before):
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
                    retrained_auc=retrained,
                    batch_size=arguments.batch_size,
                    resamples=arguments.resamples,
                    seed=arguments.seed,
                    say=place.say,
                    done=done,
                )
        found["result"].write(folder)
        if before is not None:
            found["original"].write(before)
        write_about(folder, given, {}, place.device)
    tell(found["result"], found.get("original"), out, arguments)
    add_to_report(run, out)
    return 0


def _retrained_auc(logs: Path | None) -> float | None:
    """That of Min-40% in the evaluation of a retrained model by the same suite."""
    if logs is None:
        return None
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
