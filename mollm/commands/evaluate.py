"""`mollm evaluate`: the metrics of a model, from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import (
    NO_ORIGINAL,
    add_loading,
    add_long_rows,
    chat_options,
    check_seed,
    data_of,
)
from mollm.commands.judges import judge_again, read_judges
from mollm.commands.results import (
    BENCHMARKS_FILE,
    Place,
    add_to_report,
    chat_of,
    default_out,
    keep_logs,
    place_of,
    refuse_other_logs,
    staged_results,
    tell,
    write_about,
)
from mollm.commands.suites import evaluate_suite, known_data
from mollm.errors import UsageError
from mollm.system.parsing import user_path
from mollm.system.terminal import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mollm.commands.judges import JudgeOption
    from mollm.evaluation.judges import Judge
    from mollm.evaluation.suite import Suite
    from mollm.evaluation.summary import Evaluation
    from mollm.models.loading import Source

_OF_A_MODEL = (
    "suite",
    "data",
    "forget",
    "retain",
    "holdout",
    "forget_split",
    "original",
    "benchmarks",
    "limit",
    "long_rows",
    "system_prompt",
    "chat_template_kwargs",
    "prompt_format",
)
"""Options that say nothing about replies that are there."""


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
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_inputs(parser)
    _add_options(parser)
    parser.set_defaults(run=_evaluate)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    model = "a run, a model folder, a .gguf file or a hub name"
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument(
        "--model", default=argparse.SUPPRESS, metavar="PATH_OR_HUB_NAME", help=model
    )
    measured.add_argument(
        "--replies",
        default=argparse.SUPPRESS,
        type=user_path,
        metavar="PATH",
        help="instead of a model: the examples.jsonl of an evaluation, or its folder; its replies "
        "are judged again, with --judge, and nothing is generated",
    )
    parser.add_argument(
        "--suite",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="a benchmark by name: tofu, muse-news, muse-books, wmdp, rwku or safety; its data "
        "come from the hub, or from the folder or hub name that --data gives",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="FOLDER_OR_HUB_NAME",
        help="locuslab/TOFU, or a folder with forget10_perturbed.jsonl, retain_perturbed.jsonl, "
        "real_authors_perturbed.jsonl, world_facts_perturbed.jsonl, and perhaps holdout10.jsonl",
    )
    what.add_argument(
        "--forget",
        default=argparse.SUPPRESS,
        metavar="PATH_OR_HUB_NAME",
        help="instead of TOFU: the examples to forget, as for `mollm unlearn`, optionally with "
        "options: '{path: locuslab/TOFU, config: forget10}' (default: those of the run)",
    )
    for name, purpose in (
        ("retain", "examples to retain"),
        ("holdout", "examples like those to forget that no model was trained on"),
    ):
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="PATH_OR_HUB_NAME",
            help=f"with --forget: {purpose}",
        )
    parser.add_argument(
        "--forget-split",
        default=argparse.SUPPRESS,
        help="with --data: forget01, forget05 or forget10 (default: forget10)",
    )
    parser.add_argument(
        "--retain-logs",
        default=argparse.SUPPRESS,
        type=user_path,
        metavar="PATH",
        help="examples.jsonl of a retain-only model, or open-unlearning's TOFU_EVAL.json of one, "
        "for forget_quality and privleak",
    )
    parser.add_argument(
        "--original",
        default=argparse.SUPPRESS,
        metavar="PATH_OR_HUB_NAME",
        help="the model before unlearning, or none (default: as the run or the card says); its "
        "figures are kept for the next time",
    )
    parser.add_argument(
        "--judge",
        default=argparse.SUPPRESS,
        action="append",
        metavar="NAME=MODEL:LABEL",
        help="a classifier of replies, such as toxicity=unitary/toxic-bert:toxic,obscene, of which "
        "any label counts; without a label a model that writes safe or unsafe, such as "
        "harmful=meta-llama/Llama-Guard-3-8B; or all by name: '{name: toxicity, model: "
        'unitary/toxic-bert, labels: [toxic], threshold: 0.7, template: "{reply}"}\'; several '
        "allowed",
    )
    parser.add_argument(
        "--judge-template",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="what judges without a template of their own read, with {reply} and perhaps "
        "{question} (default: {reply}; a model that writes its verdict is asked by its chat "
        "template)",
    )
    parser.add_argument(
        "--benchmarks",
        default=argparse.SUPPRESS,
        metavar="mmlu,hellaswag,...",
        help="tasks of lm-evaluation-harness to run as well",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        default=argparse.SUPPRESS,
        metavar="model_utility,forget_quality,...",
        help="metrics to compute (default: all that the inputs allow)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=argparse.SUPPRESS,
        help="examples of each set and of each benchmark (default: all)",
    )
    add_long_rows(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="examples per batch")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest reply, in tokens")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="resamples of each confidence interval"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument(
        "--no-cache", action="store_true", help="measure the original even if that is known"
    )
    parser.add_argument(
        "--explain", action="store_true", help="say why figures are missing, and how to get them"
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=argparse.SUPPRESS,
        help="folder for the results (default: evaluation in the folder of the run, else "
        "runs/evaluate)",
    )
    add_loading(parser)
    parser.add_argument("--quiet", action="store_true", help="print the figures alone, and no bar")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _evaluate(arguments: argparse.Namespace) -> int:
    from mollm.evaluation.benchmarks import find_benchmarks
    from mollm.evaluation.evaluate import wanted_scores
    from mollm.models import loading
    from mollm.report.run_file import model_of, original_of, run_of

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    judges = read_judges(given.get("judge", ()), given.get("judge_template"))
    if "judge_template" in given and not judges:
        raise UsageError("judge-template needs a judge: give one with --judge.")
    if "replies" in given:
        return _judge_replies(given, judges, arguments)
    check_seed(arguments.seed)
    given["model"] = model_of(arguments.model)
    if "suite" in given and not known_data(given):
        return evaluate_suite(given, arguments)
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
    place = place_of(arguments)
    source = loading.find_model(given["model"])
    original = None if first is None else loading.find_model(first)
    with staged_results(out, original=original is not None) as (folder, before):
        loaded = {name: j.load(place.device, place.dtype) for name, j in judges.items()}
        measured = _measure(source, original, suite, loaded, options, given, place)
        measured.result.write(folder)
        if measured.original is not None and before is not None:
            measured.original.write(before)
        write_about(folder, given, measured.chat, place.device)
    tell(measured.result, measured.original, out, arguments)
    add_to_report(run, out)
    if tasks is not None:
        _run_benchmarks(measured, tasks, given, out / BENCHMARKS_FILE, place)
    return 0


def _judge_replies(
    given: Mapping[str, Any], judges: Mapping[str, JudgeOption], arguments: argparse.Namespace
) -> int:
    """Judges stored replies again."""
    from mollm.system.folders import staged

    path: Path = given["replies"]
    stray = next((name for name in _OF_A_MODEL if name in given), None)
    if stray is not None:
        flag = stray.replace("_", "-")
        raise UsageError(f"{flag} goes with --model, but got --replies: leave out one.")
    if not judges:
        raise UsageError("replies needs a judge: give one with --judge.")
    out = given.get("out", (path if path.is_dir() else path.parent) / "judged")
    for other in (path, given.get("retain_logs")):
        keep_logs(other, out)
    chat = chat_of(path)
    if chat is not None:
        refuse_other_logs(given.get("retain_logs"), chat)
    place = place_of(arguments)
    with staged(out) as folder:
        loaded = {name: j.load(place.device, place.dtype) for name, j in judges.items()}
        place.say("Judging replies …")
        result = judge_again(
            path,
            loaded,
            retain_logs=given.get("retain_logs"),
            names=given["metrics"].split(",") if "metrics" in given else None,
            resamples=arguments.resamples,
            seed=arguments.seed,
        )
        result.write(folder)
        write_about(folder, given, chat or {}, place.device)
    tell(result, None, out, arguments)
    return 0


@dataclass(frozen=True)
class _Measured:
    """Both evaluations, and the model that was measured."""

    result: Evaluation
    original: Evaluation | None
    chat: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def _fill_in(given: dict[str, Any], run: Mapping[str, Any] | None) -> None:
    """Takes from the run what it knows and the command line does not say."""
    if run is not None:
        if "data" not in given and "forget" not in given:
            given |= {n: v for n, v in run.get("given", {}).items() if n not in given}
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
) -> _Measured:
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
    return _Measured(result, before, chat, model, tokenizer)


def _run_benchmarks(
    measured: _Measured, tasks: list[str], given: Mapping[str, Any], path: Path, place: Place
) -> None:
    from mollm.evaluation.benchmarks import general_benchmarks
    from mollm.system.folders import replace_text

    place.say(f"Running {', '.join(tasks)} …")
    options = {"batch_size": given["batch_size"], "limit": given.get("limit")}
    found = general_benchmarks(measured.model, measured.tokenizer, tasks, **options)
    for task, figures in found.items():
        place.say(f"{task}  {', '.join(f'{name} {v:.4g}' for name, v in figures.items())}")
    replace_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    place.say(f"Benchmarks: {path}")


def _suite(given: Mapping[str, Any]) -> Suite:
    from mollm.evaluation.suite import load_suite, load_tofu

    shared = {name: given.get(name) for name in ("retain_logs", "limit")}
    if "data" in given:
        stray = [name for name in ("retain", "holdout") if name in given]
        if stray:
            raise UsageError(f"{stray[0]} goes with --forget, but got --data: leave out one.")
        split = given.get("forget_split", "forget10")
        return load_tofu(given["data"], forget_split=split, **shared)
    if "forget_split" in given:
        raise UsageError("forget-split goes with --data, but got --forget: leave out one.")
    sets = {name: data_of(given[name]) for name in ("retain", "holdout") if name in given}
    return load_suite(data_of(given["forget"]), **sets, **shared)
