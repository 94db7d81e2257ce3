"""`mollm evaluate`: the metrics of a model, from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import NO_ORIGINAL, chat_options, check_seed, data_of
from mollm.commands.evaluation_options import (
    FIXED,
    REPLIES,
    add_options,
    read_options,
)
from mollm.commands.judges import judge_again, read_judges
from mollm.commands.results import (
    BENCHMARKS_FILE,
    Measured,
    Place,
    chat_of,
    default_out,
    keep_logs,
    keep_results,
    place_of,
    refuse_other_logs,
)
from mollm.commands.suites import evaluate_suite, name_data
from mollm.errors import UsageError
from mollm.system.terminal import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mollm.commands.judges import JudgeOption
    from mollm.evaluation.judges import Judge
    from mollm.evaluation.suite import Suite
    from mollm.evaluation.summary import Evaluation
    from mollm.models.loading import Source


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure what a model forgot and what it still knows",
        description=(
            "Measures a model, and the original beside it, on the files that it was unlearned with "
            "or on those of TOFU, with confidence intervals, and writes metrics.json, for each "
            "question examples.jsonl, and about.json with the settings and versions. Of a run of "
            "`mollm unlearn` the original and the files are known, and its report gets the "
            "metrics. Pass the examples.jsonl of a model trained without the forget set as "
            "--retain-logs."
        ),
        epilog=(
            "To train such a model, start from what it was before it learnt the data and give all "
            "weight to the retain rows: mollm unlearn --method sum --set 'preferences=[0, 0, 1]' "
            "--set freeze_embeddings=false --set max_loss_rise=1000."
        ),
    )
    add_options(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from mollm.report.run_file import model_of

    way, given = read_options(arguments)
    judges = read_judges(given.get("judge", ()), given.get("judge_template"))
    if "judge_template" in given and not judges:
        raise UsageError("judge-template needs a judge: give one with --judge.")
    if way == REPLIES:
        return _judge_replies(given, judges, arguments)
    check_seed(arguments.seed)
    given["model"] = model_of(arguments.model)
    if way == FIXED:
        return evaluate_suite(given, arguments)
    name_data(way, given)
    return _evaluate_sets(given, judges, arguments)


def _evaluate_sets(
    given: dict[str, Any], judges: Mapping[str, JudgeOption], arguments: argparse.Namespace
) -> int:
    """Measures a model on sets of the user's or TOFU's."""
    from mollm.evaluation.benchmarks import find_benchmarks
    from mollm.evaluation.evaluate import wanted_scores
    from mollm.models import loading
    from mollm.report.run_file import original_of, run_of

    run = run_of(given["model"])
    _fill_in(given, run)
    out = given.setdefault("out", default_out(run))
    names = given["metrics"].split(",") if "metrics" in given else None
    keep_logs(given.get("retain_logs"), out)
    suite = _suite(given)
    tasks = given["benchmarks"].split(",") if "benchmarks" in given else None
    if tasks is not None:
        find_benchmarks(tasks)
    first = given.get("original") or original_of(given["model"])
    first = None if first == NO_ORIGINAL else first
    options: dict[str, Any] = {n: given[n] for n in ("batch_size", "max_new_tokens", "resamples")}
    options["long_rows"] = given.get("long_rows", "cut")
    wanted_scores(suite, names=names, original=first is not None, judges=judges, **options)
    options |= {
        "names": names,
        "seed": arguments.seed,
        **chat_options(given, run),
    }
    source = loading.find_model(given["model"])
    original = None if first is None else loading.find_model(first)
    asked: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = []

    def measure(place: Place) -> Measured:
        loaded = {name: j.load(place.device, place.dtype) for name, j in judges.items()}
        measured, its = _measure(source, original, suite, loaded, options, given, place)
        asked.append(its)
        return measured

    keep_results(out, given, arguments, measure, run=run, original=original is not None)
    if tasks is not None:
        _run_benchmarks(*asked[0], tasks, given, out / BENCHMARKS_FILE, place_of(arguments))
    return 0


def _judge_replies(
    given: Mapping[str, Any], judges: Mapping[str, JudgeOption], arguments: argparse.Namespace
) -> int:
    """Judges stored replies again."""
    path: Path = given["replies"]
    if not judges:
        raise UsageError("replies needs a judge: give one with --judge.")
    out = given.get("out", (path if path.is_dir() else path.parent) / "judged")
    for other in (path, given.get("retain_logs")):
        keep_logs(other, out)
    chat = chat_of(path)
    if chat is not None:
        refuse_other_logs(given.get("retain_logs"), chat)

    def measure(place: Place) -> Measured:
        loaded = {name: j.load(place.device, place.dtype) for name, j in judges.items()}
        place.say("Judging replies …")
        found = judge_again(
            path,
            loaded,
            retain_logs=given.get("retain_logs"),
            names=given["metrics"].split(",") if "metrics" in given else None,
            resamples=arguments.resamples,
            seed=arguments.seed,
        )
        return Measured(found, chat=chat or {})

    keep_results(out, given, arguments, measure)
    return 0


def _fill_in(given: dict[str, Any], run: Mapping[str, Any] | None) -> None:
    """Takes from the run what it knows and the command line does not say."""
    if run is not None:
        if "data" not in given and "forget" not in given:
            known = run.get("given", {})
            given |= {n: known[n] for n in ("forget", "retain") if n in known and n not in given}
        if "long_rows" in run["settings"]:
            given.setdefault("long_rows", run["settings"]["long_rows"])
    if "data" not in given and "forget" not in given:
        raise UsageError(
            "data must be given, but it is not: add --forget and --retain, or --data for TOFU."
        )


def _measure(
    source: Source,
    original: Source | None,
    suite: Suite,
    judges: Mapping[str, Judge],
    options: dict[str, Any],
    given: Mapping[str, Any],
    place: Place,
) -> tuple[Measured, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Both evaluations, and the model that was measured with its tokenizer."""
    from mollm.data.chat import ChatFormat
    from mollm.evaluation.cache import cached, key_of
    from mollm.evaluation.evaluate import evaluate
    from mollm.evaluation.journal import Journal, journal_file
    from mollm.models import loading

    place.say(f"Loading {source.label} …")
    model, tokenizer = loading.load(source, place.device, place.dtype)
    chat = ChatFormat(
        tokenizer,
        template_kwargs=options["chat_template_kwargs"],
        system_prompt=options["system_prompt"],
        prompt_format=options["prompt_format"],
    ).identity
    refuse_other_logs(given.get("retain_logs"), chat)
    first = None
    if original is not None:
        place.say(f"Loading {original.label} …")
        first = loading.load(original, place.device, place.dtype)

    about = {**options, "judges": given.get("judge"), "template": given.get("judge_template")}
    about |= {"dtype": str(place.dtype), "device": place.device.type}

    def measure(
        each: PreTrainedModel, its: PreTrainedTokenizerBase, what: str, key: str
    ) -> Evaluation:
        journal = Journal(journal_file(given["out"], what), key)
        if journal.known:
            place.say(f"{what}: {journal.known} questions are known from a run that was stopped.")
        found = evaluate(
            each,
            its,
            suite,
            original=None if first is None else first[0],
            original_tokenizer=None if first is None else first[1],
            judges=judges,
            journal=journal,
            say=place.say,
            show=lambda total: progress(0 if place.quiet else total, what),
            **options,
        )
        return found

    before, of_original = None, None
    if first is not None:
        of_original = key_of(*first, suite, about)
        make = partial(measure, *first, "Original", of_original)
        before, known = (make(), False) if given["no_cache"] else cached(of_original, suite, make)
        if known:
            place.say("The figures of the original are known from before.")
    key = key_of(model, tokenizer, suite, {**about, "original": of_original})
    result = measure(model, tokenizer, "Result", key)
    return Measured(result, before, chat), (model, tokenizer)


def _run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    given: Mapping[str, Any],
    path: Path,
    place: Place,
) -> None:
    from mollm.evaluation.benchmarks import general_benchmarks
    from mollm.system.folders import replace_text

    place.say(f"Running {', '.join(tasks)} …")
    options = {"batch_size": given["batch_size"], "limit": given.get("limit")}
    found = general_benchmarks(model, tokenizer, tasks, **options)
    for task, figures in found.items():
        place.say(f"{task}  {', '.join(f'{name} {v:.4g}' for name, v in figures.items())}")
    replace_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    place.say(f"Benchmarks: {path}")


def _suite(given: Mapping[str, Any]) -> Suite:
    from mollm.evaluation.suite import load_suite, load_tofu

    shared = {name: given.get(name) for name in ("retain_logs", "limit")}
    if "data" in given:
        split = given.get("forget_split", "forget10")
        return load_tofu(given["data"], forget_split=split, **shared)
    sets = {name: data_of(given[name]) for name in ("retain", "holdout") if name in given}
    return load_suite(data_of(given["forget"]), **sets, **shared)
