"""`mollm audit`: tries to bring back what a model forgot, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import (
    add_loading,
    add_long_rows,
    chat_options,
    chat_words,
    data_of,
    device_of,
)
from mollm.errors import UsageError
from mollm.system.parsing import user_path

if TYPE_CHECKING:
    import torch

    from mollm.audit import Audit
    from mollm.models.loading import Source

_NOT_PASSED = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "audit",
        help="try to bring back what a model forgot",
        description=(
            "Tries to bring forgotten answers back: asks in other words, teaches some of them "
            "again, rounds the weights, samples many replies. Compares with the original model "
            "and, where there is one, with a model that never saw the forget set. Writes "
            "audit.json and audit.html. Exit status: 0 for PASS, 1 for WEAK or FAIL."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = "a model folder, a .gguf file or a hub name"
    for name, purpose, required in (
        ("model", f"the model that unlearned: {where}, or the folder of a LoRA adapter", True),
        ("original", f"the model before unlearning: {where}", True),
        ("forget", "the examples to forget, as for `mollm unlearn`", True),
        ("retain", "examples to retain, to see what was kept", False),
        ("retain-only", f"a model trained without the forget set: {where}", False),
        ("holdout", "examples like those to forget that no model was trained on", False),
    ):
        parser.add_argument(
            f"--{name}",
            required=required,
            default=argparse.SUPPRESS,
            metavar="PATH_OR_HUB_NAME",
            help=purpose,
        )
    parser.add_argument(
        "--out",
        type=user_path,
        default=argparse.SUPPRESS,
        help="results folder (default: audit in the folder of the run that made the model, whose "
        "report and card get the verdict, else runs/audit)",
    )
    parser.add_argument(
        "--learning-rates",
        default=argparse.SUPPRESS,
        metavar="LR,LR,...",
        help="of relearning (default: 5e-5,5e-4,1.5e-3; a LoRA adapter takes ten times as much)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="examples per batch")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="resamples of each confidence interval"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    parser.add_argument(
        "--short",
        action="store_true",
        default=False,
        help="only the questions, as they are and in other prompts, and one relearning; never in "
        "place of a full audit",
    )
    parser.add_argument(
        "--json", action="store_true", default=False, help="print audit.json, all else to stderr"
    )
    add_long_rows(parser)
    add_loading(parser)
    parser.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from mollm.audit.report import JSON_FILE
    from mollm.report.audit_file import AUDIT, refuse_to_replace_full
    from mollm.report.run_file import model_of, run_of
    from mollm.system.folders import locked

    run = run_of(arguments.model)
    if "out" not in arguments:
        arguments.out = Path("runs/audit") if run is None else Path(run["folder"]) / AUDIT
    arguments.model = model_of(arguments.model)
    if arguments.short and "holdout" in arguments:
        raise UsageError(
            "holdout must be left out with --short, which infers no membership, but got "
            f"{arguments.holdout}: leave out one of the two."
        )
    with locked(arguments.out):
        if arguments.short:
            refuse_to_replace_full(arguments.out, run)
        if not arguments.json:
            return _audit_and_tell(arguments, run)
        with contextlib.redirect_stdout(sys.stderr):
            status = _audit_and_tell(arguments, run)
    print((arguments.out / JSON_FILE).read_text(encoding="utf-8").rstrip())
    return status


def _audit_and_tell(arguments: argparse.Namespace, run: Mapping[str, Any] | None) -> int:
    import torch

    from mollm.audit import audit
    from mollm.audit.report import HTML_FILE, JSON_FILE, write_html, write_json
    from mollm.audit.run import LEARNING_RATES, check_options
    from mollm.evaluation.suite import load_suite
    from mollm.models import adapters, loading
    from mollm.report.audit_file import is_shown
    from mollm.report.page import read_steps
    from mollm.report.run_file import model_of
    from mollm.system.folders import check_writable

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    rates = _rates(given.get("learning_rates"), LEARNING_RATES)
    chat = chat_options(given, run)
    known = {} if run is None else run["settings"]
    long_rows = given.get("long_rows", known.get("long_rows", "cut"))
    sets = {name: data_of(given[name]) for name in ("retain", "holdout") if name in given}
    suite = load_suite(data_of(given["forget"]), **sets)
    check_options(suite, rates, arguments.batch_size, arguments.resamples, arguments.seed)
    device = device_of(arguments.device)
    sources, tokenizer = _find_models(given)
    out: Path = arguments.out
    check_writable(out)
    if run is not None and is_shown(out, run):
        read_steps(run["folder"])  # says now what the report could not be made of at the end
    models: dict[str, Any] = {}
    for role, source in sources.items():
        print(f"Loading {given[role]} …")
        models[role], _ = loading.load(source, device, getattr(torch, arguments.dtype))
    if adapters.is_adapter(given["model"]):
        models["model"] = adapters.load_adapter(models["model"], given["model"])
    about = _about(given, device)
    if run is not None and given["model"] == model_of(run["folder"]):
        about["model"] = Path(run["folder"]).resolve().name  # the model in it is called model
    out.mkdir(parents=True, exist_ok=True)

    def told(so_far: Audit) -> None:
        (out / HTML_FILE).unlink(missing_ok=True)  # of an earlier audit
        print(_fitting(str(so_far.findings[-1])), flush=True)
        write_json(so_far, about, out)

    found = audit(
        models["model"],
        tokenizer,
        suite,
        original=models["original"],
        retain_only=models.get("retain_only"),
        learning_rates=rates,
        batch_size=arguments.batch_size,
        resamples=arguments.resamples,
        seed=arguments.seed,
        long_rows=long_rows,
        short=arguments.short,
        **chat,
        after_finding=told,
        progress=sys.stderr.isatty(),
    )
    write_json(found, about, out)
    write_html(found, about, out)
    _tell_run(run, out)
    _print_verdict(found, given, chat)
    print(f"Report: {out / HTML_FILE}")
    print(f"For machines: {out / JSON_FILE}")
    return 0 if found.verdict == "PASS" else _NOT_PASSED


def _fitting(line: str) -> str:
    """On a terminal, in as many lines as it takes; each finding is one line elsewhere."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * len("FAIL  "))


def _tell_run(run: Mapping[str, Any] | None, out: Path) -> None:
    """Has report and cards of the run show the verdict, if the audit lies in its folder."""
    from mollm.report.audit_file import is_shown, write_audited_cards
    from mollm.report.page import REPORT_FILE, write_report

    if run is not None and is_shown(out, run):
        folder = Path(run["folder"])
        write_audited_cards(run)
        write_report([folder], folder / REPORT_FILE)


def _print_verdict(found: Audit, given: Mapping[str, Any], chat: Mapping[str, Any]) -> None:
    print(f"\nVerdict: {found.verdict_shown}")
    for note in found.notes:
        print(note)
    if "retain_only" not in given:
        print(
            "This makes one, from the model as it was before it learnt the data:\n"
            f"{_making(given, chat)}"
        )
    for name, reason in found.missing.items():
        print(f"Not in the verdict: {name}: {reason}.")


def _making(given: Mapping[str, Any], chat: Mapping[str, Any]) -> str:
    """The command that makes a retain-only model."""
    return shlex.join(
        [
            *("mollm", "unlearn", "--model", "BEFORE_IT_LEARNT"),
            *("--forget", given["forget"], "--retain", given.get("retain", "RETAIN")),
            *chat_words(chat),
            *("--method", "sum", "--set", "preferences=[0, 0, 1]"),
            *("--set", "freeze_embeddings=false", "--set", "max_loss_rise=1000"),
            *("--max-steps", "1000", "--out", "runs/retain-only"),
        ]
    )


def _find_models(given: Mapping[str, Any]) -> tuple[dict[str, Source], Any]:
    """Where the models are, the tokenizer of the one under audit, and whether they go together.

    Of an adapter that is where the original is, which it is put on.
    """
    from mollm.audit.checks import check_related, check_same_tokens
    from mollm.models import adapters, loading

    names = {role: given[role] for role in ("original", "retain_only", "model") if role in given}
    if adapters.is_adapter(given["model"]):
        names["model"] = given["original"]
    sources = {role: loading.find_model(name) for role, name in names.items()}
    tokenizer = loading.load_tokenizer(sources["model"])
    for role, name in names.items():
        if name != names["model"]:
            shown = role.replace("_", "-")
            check_related(names["model"], name, shown)
            check_same_tokens(tokenizer, loading.load_tokenizer(sources[role]), shown)
    return sources, tokenizer


def _rates(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    try:
        return default if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            "learning-rates must be numbers with commas between, such as 1e-5,1e-4, but got "
            f"{text}."
        ) from error


def _about(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What was audited, in names that others may read."""
    from datetime import datetime, timezone

    from mollm.system import machine
    from mollm.system.folders import public_name

    names = ("model", "original", "retain_only", "forget", "retain", "holdout")
    return {name: public_name(given[name]) if name in given else None for name in names} | {
        "dtype": given["dtype"],
        "device": machine.device_name(device),
        "versions": machine.versions("peft", "bitsandbytes"),
        "commit": machine.commit(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
