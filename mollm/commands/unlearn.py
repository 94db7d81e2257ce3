"""`mollm unlearn`: a run of MOLLMTrainer from a file of settings and the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mollm.commands.arguments import add_chat_options, chat_words
from mollm.commands.preview import shown
from mollm.commands.settings_file import OWN_SETTINGS, evaluated_sets, read_settings, require
from mollm.errors import UsageError, did_you_mean
from mollm.system.folders import (
    UNFINISHED,
    check_space,
    check_writable,
    complete,
    locked,
    replace_text,
)
from mollm.system.parsing import reason_of, user_path
from mollm.system.tables import aligned
from mollm.system.terminal import has_colour

if TYPE_CHECKING:
    from mollm.training.config import MOLLMConfig
    from mollm.training.trainer import MOLLMTrainer

logger = logging.getLogger(__name__)

_MODEL = "model"
_STOPPED = 1
_ASKED = 4
"""Questions of each set, before and after."""
_PREVIEWED = 12
"""Lines of a row at the beginning of a run."""
_MOST_STEPS = 10**9
_EXAMPLE = """\
A settings file:

  model: path/to/model
  forget: forget.jsonl            # a file, a folder or a hub name, several by name, or options:
  retain:
    path: locuslab/TOFU           # also schema, prompt_field, answer_field, where
    config: retain90
    split: train
  out: runs/unlearn
  lora: 16                        # a rank, or options of peft.LoraConfig
  learning_rate: 1.0e-5           # this and all below: any field of mollm.MOLLMConfig
  max_steps: 100

Several GPUs, each with a copy of the model or, with fsdp, a part of it; OUT must be a folder that
all of them see:

  torchrun --standalone --nproc-per-node 8 -m mollm unlearn --config run.yaml --set fsdp=full_shard

and on several nodes, on each of them:

  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m mollm unlearn --config run.yaml --set fsdp=hybrid_shard
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers of `mollm`."""
    parser = commands.add_parser(
        "unlearn",
        help="make a model forget some answers and keep others",
        description=(
            "Trains a model to forget some answers and keep others, and writes the model, its "
            "card and the history of the run. Command-line options override the settings "
            "file."
        ),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="settings file")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_HUB_NAME",
        help="model to unlearn from: folder, .gguf file or hub name",
    )
    parser.add_argument(
        "--forget",
        metavar="PATH_OR_HUB_NAME",
        help="examples to forget; several sets, each an objective, as '{ada: FILE, bob: FILE}'",
    )
    parser.add_argument(
        "--retain",
        metavar="PATH_OR_HUB_NAME",
        help="examples to retain, or several sets of them; auto for ones that the model makes",
    )
    parser.add_argument(
        "--eval-forget", metavar="PATH_OR_HUB_NAME", help="forget examples for evaluation"
    )
    parser.add_argument(
        "--eval-retain", metavar="PATH_OR_HUB_NAME", help="retain examples for evaluation"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="new folder for the results (default: runs/unlearn)"
    )
    parser.add_argument("--method", help="one of mollm.methods.METHODS (default: mollm)")
    parser.add_argument(
        "--method-option",
        action="append",
        metavar="NAME=VALUE",
        help="a hyperparameter of the method, such as beta=0.2; several allowed",
    )
    parser.add_argument("--learning-rate", type=float, metavar="LR")
    parser.add_argument("--max-steps", type=int, metavar="N")
    parser.add_argument(
        "--num-train-epochs", type=float, metavar="N", help="passes over the forget examples"
    )
    parser.add_argument(
        "--per-device-train-batch-size",
        type=int,
        metavar="N",
        help="forget examples per micro-batch, and by default retain examples",
    )
    parser.add_argument(
        "--per-device-retain-batch-size",
        type=int,
        metavar="N",
        help="retain examples per micro-batch",
    )
    parser.add_argument("--gradient-accumulation-steps", type=int, metavar="N")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens per example, at most")
    add_chat_options(parser)
    parser.add_argument(
        "--reference", help="reference model: adapter, copy, cache or auto (default)"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--dtype", help="weight dtype: float32 (default) or bfloat16")
    parser.add_argument("--compute-dtype", help="auto (default), float32 or bfloat16")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other field of mollm.MOLLMConfig; several allowed",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the latest checkpoint in --out, or start afresh if there is none",
    )
    parser.add_argument("--quiet", action="store_true", help="print the end alone, and no bar")
    parser.add_argument(
        "--json", action="store_true", help="print the end as JSON, and all else to stderr"
    )
    parser.set_defaults(run=_unlearn)


def _unlearn(arguments: argparse.Namespace) -> int:
    from transformers import PrinterCallback

    from mollm.distributed import processes
    from mollm.distributed.watch import blaming_the_dead

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    resume, quiet = given.pop("resume", False), given.pop("quiet", False)
    as_json = given.pop("json", False)
    settings = read_settings(given)
    out = user_path(settings.pop("out", None) or "runs/unlearn")
    require(settings)
    settings.setdefault("disable_tqdm", quiet)
    args = make_arguments(settings, out)  # the processes know of each other from here on
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(blaming_the_dead())
            with processes.raise_on_all_ranks():
                if processes.rank() == 0:
                    check_writable(out)
                    _check_out(out, resume)
                    held.enter_context(locked(out))
            trainer = _trainer(settings, args)
            if quiet or as_json:
                trainer.remove_callback(PrinterCallback)  # prints what is logged
            if processes.rank() == 0 and not quiet:
                told = shown(
                    replace(trainer.preview(1, known=True), notes=()),  # said by the trainer
                    colour=has_colour(sys.stderr if as_json else sys.stdout),
                    most_lines=_PREVIEWED,
                )
                print(told, file=sys.stderr if as_json else sys.stdout, flush=True)
            settings = {**settings, "retain": trainer.retain_dataset}
            status = _run(trainer, settings, out, resume, as_json)
    except UsageError:  # on all of them
        processes.stop()
        raise
    processes.stop()
    return status


# ---- the run


def _check_out(out: Path, resume: bool) -> None:
    if resume and (out / _MODEL).exists():
        raise UsageError(
            f"out must be a folder with an unfinished run to resume, but that in {out} has "
            f"finished: its model is {out / _MODEL}."
        )
    if not resume and out.is_dir():
        names = sorted(path.name for path in out.iterdir())
        # Retain data that the model made for a run which then failed are taken by the next one.
        left = (f"{UNFINISHED}*", "retain-auto-*.jsonl")
        found = [name for name in names if not any(fnmatchcase(name, each) for each in left)]
        if found:
            raise UsageError(
                f"out must be a new or empty folder, but {out} holds {found[0]}: choose another "
                "one with --out, or go on with its run with --resume."
            )


def make_arguments(settings: Mapping[str, Any], out: Path) -> MOLLMConfig:
    """The MOLLMConfig of a run that writes to `out`.

    Raises:
        UsageError: A setting is out of range, or settings do not go together.
    """
    from mollm.training.config import MOLLMConfig

    options = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    options.setdefault("sample_replies", 0 if options.get("fsdp") else _ASKED)
    if settings.get("device") == "cpu":
        options["use_cpu"] = True
    elif settings.get("device", "cuda") != "cuda":
        raise UsageError(f"device must be cpu or cuda, but got {settings['device']!r}.")
    try:
        args = MOLLMConfig(output_dir=str(out), **options)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        reason = reason_of(error, None)
        raise UsageError(f"the settings do not go together: {reason}.") from error
    for name, least, most in (
        ("seed", 0, 2**32 - 1),
        ("max_steps", -1, _MOST_STEPS),
        ("num_train_epochs", 0, _MOST_STEPS),
    ):
        value = getattr(args, name)
        if not least <= value <= most:
            raise UsageError(f"{name} must be from {least} to {most}, but got {value}.")
    if settings.get("device") == "cuda" and args.device.type != "cuda":
        raise UsageError("device must be one that Torch finds on this machine, but got 'cuda'.")
    return args


def _trainer(settings: Mapping[str, Any], args: MOLLMConfig) -> MOLLMTrainer:
    from mollm.distributed import processes
    from mollm.models import loading
    from mollm.system.precision import DTYPES
    from mollm.training.trainer import MOLLMTrainer

    adapter = make_adapter(settings.get("lora"))
    args.require_adapter_if_quantized(adapter)
    with processes.raise_on_all_ranks():
        if processes.rank() == 0:
            size = loading.count_parameters(loading.find_model(settings["model"]))
            needed = size * DTYPES[args.dtype].itemsize
            check_space(Path(args.output_dir), needed, "the weights of the model")
    trainer = MOLLMTrainer(
        settings["model"],
        args,
        forget_dataset=settings["forget"],
        retain_dataset=settings["retain"],
        eval_dataset=evaluated_sets(settings) or None,
        peft_config=adapter,
    )
    trainer.more_facts = {
        "command": shlex.join(["mollm", *sys.argv[1:]]),
        "given": {
            "forget": _told(settings["forget"]),
            "retain": _told(trainer.retain_dataset),
        },
    }
    return trainer


def make_adapter(lora: Any) -> Any:
    """The LoraConfig that the setting `lora` asks for; None for none.

    Raises:
        UsageError: It is neither a rank nor options.
    """
    if not lora:
        return None
    from peft import LoraConfig

    options = {"r": lora} if isinstance(lora, int) and lora is not True else lora
    try:
        if not isinstance(options, Mapping):
            raise TypeError("it is neither a whole number nor a mapping")
        rank = options.get("r", 8)
        if not isinstance(rank, int):
            raise TypeError("r must be a whole number")
        return LoraConfig(
            **{"target_modules": "all-linear", "lora_alpha": 2 * rank, **options},
            task_type="CAUSAL_LM",
        )
    except (TypeError, ValueError) as error:
        known = [f.name for f in fields(LoraConfig)]
        unknown = (
            [str(name) for name in lora if name not in known] if isinstance(lora, dict) else []
        )
        if unknown:
            reason = f"it has no {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        else:
            reason = reason_of(error, None) + "."
        raise UsageError(
            f"lora must be a rank or options of peft.LoraConfig, but got {lora!r}: {reason}"
        ) from error


def _run(
    trainer: MOLLMTrainer, settings: Mapping[str, Any], out: Path, resume: bool, as_json: bool
) -> int:
    from mollm.distributed import processes
    from mollm.report.page import REPORT_FILE
    from mollm.training import checkpoint

    def tell(text: str) -> None:
        if processes.rank() == 0:
            print(text, file=sys.stderr if as_json else sys.stdout)

    try:
        trainer.train(resume_from_checkpoint=resume and bool(checkpoint.checkpoints(out)))
    except KeyboardInterrupt:
        found = checkpoint.checkpoints(out)
        if found:
            tell(f"\nThe same command with --resume goes on from {found[-1]}.")
        raise
    tell(summary(trainer))
    if trainer.stop_reason is not None:
        found = checkpoint.checkpoints(out)
        last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint"
        tell(f"Failed: {trainer.stop_reason}")
        tell(f"Stopped early, and wrote no model; {last}{_skips(trainer)}.")
        _print_json(trainer, out, as_json)
        return _STOPPED
    if trainer.target_told is not None:
        tell(f"stop_when: {trainer.target_told}")
    with processes.on_rank_zero(complete(out / _MODEL)) as folder:
        trainer.export(folder or out)
        if folder is not None:
            replace_text(folder / "README.md", trainer.model_card())
    tell(f"Model: {out / _MODEL}")
    tell(f"Report: {out / REPORT_FILE}   Card and history: beside it")
    tell(f"Next: {evaluate_line(settings, out)}")
    if _skips(trainer):
        tell(f"Mind that the run made less than it was asked for{_skips(trainer)}.")
    _print_json(trainer, out, as_json)
    return 0


def _print_json(trainer: MOLLMTrainer, out: Path, wanted: bool) -> None:
    from mollm.distributed import processes
    from mollm.report.page import REPORT_FILE
    from mollm.training.history import nan_to_none, skipped_in

    if not wanted or processes.rank():
        return
    model = out / _MODEL
    told = {
        "model": str(model) if model.is_dir() else None,
        "report": str(out / REPORT_FILE),
        "steps": len(trainer.history),
        "skipped_steps": skipped_in(trainer.history),
        "losses": trainer.history[-1].losses if trainer.history else None,
        "failure": trainer.stop_reason,
        "stop_when": trainer.target_told,
    }
    print(json.dumps(nan_to_none(told), indent=1, ensure_ascii=False))


def _told(data: Any) -> str:
    """Data as `mollm evaluate` takes it, from any folder."""
    found = resolved(data)
    return found if isinstance(found, str) else json.dumps(found)


def resolved(data: Any) -> Any:
    """Data with the paths in it from the root: that of a set, or of each of several by name."""
    from mollm.data.sets import AUTO

    if isinstance(data, str):
        path = user_path(data)
        if data == AUTO:
            return data
        return str(path.resolve()) if path.exists() else data
    if not isinstance(data, Mapping):
        return data
    if "path" in data:
        return {**data, "path": resolved(data["path"])}
    return {name: resolved(one) for name, one in data.items()}


def _skips(trainer: MOLLMTrainer) -> str:
    from mollm.training.history import skipped_in

    skipped = skipped_in(trainer.history)
    if not skipped:
        return ""
    return (
        f"; {skipped} of {len(trainer.history)} steps were skipped, because a gradient was not "
        "finite"
    )


def evaluate_line(settings: Mapping[str, Any], out: Path) -> str:
    """The command that measures the model of a run."""
    words = ["mollm", "evaluate", "--model", str(out / _MODEL), "--original", settings["model"]]
    for name in ("forget", "retain"):
        data = settings[name]
        words += [f"--{name}", data if isinstance(data, str) else json.dumps(data)]
    words += chat_words(settings)
    if settings.get("long_rows", "cut") != "cut":
        words += ["--long-rows", settings["long_rows"]]
    if settings.get("dtype", "float32") != "float32":
        words += ["--dtype", settings["dtype"]]
    return shlex.join(words)


def summary(trainer: MOLLMTrainer) -> str:
    """Losses, weights and conflicts of a run as a table for the terminal."""
    from mollm.report.conflicts import conflict_rate

    history = trainer.history
    if not history:
        return "No step was made."
    cells = [("objective", "first loss", "last loss", "mean weight", "conflicts")]
    for name in history[0].losses:
        first, last = history[0].losses[name], history[-1].losses[name]
        weight = sum(record.weights[name] for record in history) / len(history)
        rate = conflict_rate((record.conflicts for record in history), name)
        conflicts = "-" if rate is None else f"{rate:.0%}"
        numbers = f"{first:.4f}", f"{last:.4f}", f"{weight:.4f}", conflicts
        cells.append((name, *numbers))
    rows = aligned(cells)
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    if evaluated:
        shown = {k: v for k, v in evaluated[-1].items() if k.endswith("_loss")}
        rows.append("   ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return f"\n{len(history)} steps{_skips(trainer)}\n" + "\n".join(rows)
