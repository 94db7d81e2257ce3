"""`mollm evaluate`: the metrics of a model, from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import add_chat_options, data_of, template_options
from mollm.errors import UsageError
from mollm.planning.settings import BYTES
from mollm.system.parsing import user_path

if TYPE_CHECKING:
    import torch

    from mollm.evaluation.judges import Judge
    from mollm.evaluation.suite import Suite


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure what a model forgot and what it still knows",
        description=(
            "Measures a model on the files that it was unlearned with or on those of TOFU, with "
            "confidence intervals, and writes metrics.json, for each question examples.jsonl, and "
            "about.json with the settings and versions. Pass the examples.jsonl of a model trained "
            "without the forget set as --retain-logs."
        ),
        epilog=(
            "To train such a model, start from what it was before it learnt the data and give all "
            "weight to the retain rows: mollm unlearn --method sum --set 'preferences=[0, 0, 1]' "
            "--set freeze_embeddings=false --set divergence=1000."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_inputs(parser)
    _add_options(parser)
    parser.set_defaults(run=_evaluate)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    model = "a model folder, a .gguf file or a hub name"
    parser.add_argument(
        "--model", required=True, default=argparse.SUPPRESS, metavar="PATH_OR_HUB_NAME", help=model
    )
    what = parser.add_mutually_exclusive_group(required=True)
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
        "options: '{path: locuslab/TOFU, config: forget10}'",
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
        help="examples.jsonl of a retain-only model, for forget_quality and priv_leak",
    )
    parser.add_argument(
        "--original",
        default=argparse.SUPPRESS,
        metavar="PATH_OR_HUB_NAME",
        help="the model before unlearning, for KL and perplexity",
    )
    parser.add_argument(
        "--judge",
        default=argparse.SUPPRESS,
        action="append",
        metavar="NAME=MODEL:LABEL",
        help="a classifier of replies, such as toxicity=unitary/toxic-bert:toxic; several allowed",
    )
    parser.add_argument(
        "--judge-template",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="what the judges read, with {reply} and perhaps {question} (default: {reply})",
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
    parser.add_argument("--batch-size", type=int, default=16, help="examples per batch")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest reply, in tokens")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="resamples of each confidence interval"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    add_chat_options(parser)
    parser.add_argument(
        "--out", type=user_path, default=Path("runs/evaluate"), help="folder for the results"
    )
    parser.add_argument(
        "--dtype",
        choices=BYTES,
        default="float32",
        help="dtype of weights and computation",
    )
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="a Torch device (default: cuda where there is a GPU, else cpu)",
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from mollm.data.chat import ChatFormat
    from mollm.evaluation.benchmarks import find_benchmarks, general_benchmarks
    from mollm.evaluation.evaluate import evaluate, wanted_scores
    from mollm.evaluation.judges import checked_template
    from mollm.models import loading
    from mollm.system import machine
    from mollm.system.folders import replace_text, staged

    given = vars(arguments)
    names = given["metrics"].split(",") if "metrics" in given else None
    _keep_logs(given.get("retain_logs"), arguments.out)
    suite = _suite(given)
    judges = _judges(given.get("judge", ()))
    if "judge_template" in given and not judges:
        raise UsageError("judge-template needs a judge: give one with --judge.")
    template = checked_template(given.get("judge_template", "{reply}"))
    tasks = given["benchmarks"].split(",") if "benchmarks" in given else None
    if tasks is not None:
        find_benchmarks(tasks)
    options = {name: given[name] for name in ("batch_size", "max_new_tokens", "resamples")}
    system_prompt = given.get("system_prompt")
    template_kwargs = template_options(given.get("chat_template_kwargs"))
    wanted_scores(suite, names=names, original="original" in given, judges=judges, **options)
    device = machine.find_device(
        given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    )
    source = loading.find_model(arguments.model)
    first = loading.find_model(given["original"]) if "original" in given else None
    dtype = getattr(torch, arguments.dtype)
    with staged(arguments.out) as folder:
        loaded = {name: _load_judge(*judge, template, device) for name, judge in judges.items()}
        print(f"Loading {arguments.model} …")
        model, tokenizer = loading.load(source, device, dtype)
        chat = ChatFormat(tokenizer, template_kwargs=template_kwargs, system_prompt=system_prompt)
        _refuse_other_logs(given.get("retain_logs"), chat.identity)
        evaluation = evaluate(
            model,
            tokenizer,
            suite,
            names=names,
            original=None if first is None else loading.load(first, device, dtype)[0],
            judges=loaded,
            seed=arguments.seed,
            say=print,
            system_prompt=system_prompt,
            chat_template_kwargs=template_kwargs,
            **options,
        )
        evaluation.write(folder)
        _write_about(folder / "about.json", given, chat.identity, device)
    print(evaluation.table())
    print(f"Figures: {arguments.out / 'metrics.json'}   By question: examples.jsonl beside it")
    general = arguments.out / "benchmarks.json"
    general.unlink(missing_ok=True)
    if tasks is not None:
        print(f"Running {', '.join(tasks)} …")
        options = {"batch_size": arguments.batch_size, "limit": given.get("limit")}
        found = general_benchmarks(model, tokenizer, tasks, **options)
        for task, figures in found.items():
            print(f"{task}  {', '.join(f'{name} {v:.4g}' for name, v in figures.items())}")
        replace_text(general, json.dumps(found, indent=2, allow_nan=False) + "\n")
        print(f"Benchmarks: {general}")
    return 0


def _keep_logs(logs: Path | None, out: Path) -> None:
    """Refuses results that would take the place of the logs, and be compared with next time."""
    if logs is not None and out.resolve() in (logs.resolve(), logs.resolve().parent):
        raise UsageError(
            f"out must be another folder than that of the retain logs, but got {out} for both: "
            "choose another one with --out."
        )


def _refuse_other_logs(logs: Path | None, chat: Mapping[str, Any]) -> None:
    """Refuses logs of a model that was asked in another way, as far as they say how."""
    if logs is None:
        return
    try:
        path = (logs if logs.is_dir() else logs.parent) / "about.json"
        known = dict(json.loads(path.read_text(encoding="utf-8"))["chat"])
    except (OSError, ValueError, TypeError, LookupError):
        return
    for name, value in chat.items():
        if known.get(name) != value:
            raise UsageError(
                f"the retain logs must be of the same {name}, but that is {value!r} now and was "
                f"{known.get(name)!r} for {logs}: evaluate both models alike."
            )


def _write_about(
    path: Path, given: Mapping[str, Any], chat: Mapping[str, Any], device: torch.device
) -> None:
    from mollm.system import machine

    about = {
        "settings": {name: value for name, value in given.items() if name != "run"},
        "chat": dict(chat),
        "device": machine.device_name(device),
        "versions": machine.versions(*(["lm_eval"] if "benchmarks" in given else [])),
        "commit": machine.commit(),
    }
    text = json.dumps(about, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _judges(texts: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Models and labels by the names of the judges."""
    found: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        model, _, label = rest.rpartition(":")
        if not (name and model and label):
            raise UsageError(
                f"judge must be NAME=MODEL:LABEL, such as toxicity=unitary/toxic-bert:toxic, but "
                f"got {text!r}."
            )
        if name in found:
            raise UsageError(f"every judge must have a name of its own, but two are called {name}.")
        found[name] = model, label
    return found


def _load_judge(model: str, label: str, template: str, device: torch.device) -> Judge:
    from mollm.evaluation.judges import ClassifierJudge

    return ClassifierJudge(model, label, template=template, device=device)


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
