"""`mollm unlearn`: a run of MOLLMTrainer from a file of settings and the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from mollm.errors import UsageError
from mollm.folder import UNFINISHED, complete, locked

if TYPE_CHECKING:
    from mollm.plan import PlanSettings
    from mollm.trainer import MOLLMTrainer
    from mollm.trainer_config import MOLLMConfig

logger = logging.getLogger(__name__)

_MODEL = "model"
_STOPPED = 1
_DATA = ("forget", "retain", "eval_forget", "eval_retain")
_OWN = ("model", *_DATA, "out", "lora", "device")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
_LASTING = ("parameters", "reference model", "optimizer state", "running means")
_EXAMPLE = """\
A settings file:

  model: path/to/model
  forget: forget.jsonl            # a file, a folder or a hub name, or with options:
  retain:
    path: locuslab/TOFU           # also schema, prompt_field, answer_field
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
            "card and the history of the run. What is given here goes before what the file says."
        ),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="a file of settings")
    parser.add_argument("--model", metavar="PATH_OR_HUB_NAME", help="what to change")
    parser.add_argument("--forget", metavar="PATH_OR_HUB_NAME", help="rows to forget")
    parser.add_argument("--retain", metavar="PATH_OR_HUB_NAME", help="rows to keep")
    parser.add_argument("--eval-forget", metavar="PATH_OR_HUB_NAME", help="rows to evaluate on")
    parser.add_argument("--eval-retain", metavar="PATH_OR_HUB_NAME", help="rows to evaluate on")
    parser.add_argument("--out", metavar="FOLDER", help="a new folder (default: runs/unlearn)")
    parser.add_argument("--method", help="one of mollm.methods.METHODS (default: mollm)")
    parser.add_argument("--learning-rate", type=float, metavar="LR")
    parser.add_argument("--max-steps", type=int, metavar="N")
    parser.add_argument("--num-train-epochs", type=float, metavar="N", help="of the forget rows")
    parser.add_argument("--per-device-train-batch-size", type=int, metavar="N")
    parser.add_argument("--gradient-accumulation-steps", type=int, metavar="N")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of a row")
    parser.add_argument("--reference", help="adapter, copy, cache or auto (default)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--dtype", help="float32 (default) or bfloat16, of the weights")
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
        help="go on from the last checkpoint in the folder, or start if it holds none",
    )
    parser.set_defaults(run=_unlearn)


def _unlearn(arguments: argparse.Namespace) -> int:
    # Imported here, so that `mollm --help` is quick and works without the extras.
    from mollm import processes

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    resume = given.pop("resume", False)
    settings = read_settings(given)
    out = Path(settings.pop("out", "runs/unlearn"))
    _require(settings)
    args = _arguments(settings, out)  # the processes know of each other from here on
    try:
        with contextlib.ExitStack() as held:
            with processes.agreeing():
                if processes.rank() == 0:
                    _check_out(out, resume)
                    held.enter_context(locked(out))
            status = _run(_trainer(settings, args), settings, out, resume)
    except UsageError:  # on all of them
        processes.stop()
        raise
    processes.stop()
    return status


# ---- settings


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, over what its settings file says.

    Args:
        given: Arguments of the command line by name, `config` and `set` among them.

    Raises:
        UsageError: The file cannot be read, or a name in it or in `set` is not known.
    """
    given = dict(given)
    settings = _read_file(given.pop("config")) if "config" in given else {}
    for text in given.pop("set", ()):
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"set must be NAME=VALUE, but got {text!r}.")
        settings[name] = _parse(value, f"the value of {name}")
    settings |= given
    types = _fields()
    for name, value in settings.items():
        if name not in types and name not in _OWN:
            raise UsageError(
                f"a setting must be one of {', '.join(_OWN)} or a field of MOLLMConfig, but got "
                f"{name!r}."
            )
        settings[name] = _typed(name, value, types.get(name))
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config must be a YAML file that can be read, but got {path}.") from error
    settings = _parse(text, str(path))
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings by name, but it does not.")
    return settings


def _parse(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} must be valid YAML, but it is not: {reason}.") from error


def _fields() -> dict[str, Any]:
    """The names of a MOLLMConfig's fields, with their types."""
    from mollm.trainer_config import MOLLMConfig

    types = get_type_hints(MOLLMConfig)
    return {f.name: types[f.name] for f in fields(MOLLMConfig) if f.name != "output_dir"}


def _typed(name: str, value: Any, declared: Any) -> Any:
    """The value of a field that is to be a bool, an int or a float; any other as it is."""
    united = get_origin(declared) in (Union, UnionType)
    kinds = set(get_args(declared) if united else (declared,))
    if type(value) in kinds or (value is None and NoneType in kinds):
        return value
    kind = next(iter(kinds - {NoneType}))
    if len(kinds - {NoneType}) > 1 or kind not in _KINDS:
        return value
    try:  # to YAML, 1e-5 is a text, for want of a point
        if kind is not bool and type(value) in (str, int, float):
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
    except ValueError:
        pass
    raise UsageError(f"{name} must be {_KINDS[kind]}, but got {value!r}.")


# ---- the run


def _require(settings: Mapping[str, Any]) -> None:
    for name in ("model", "forget", "retain"):
        if not settings.get(name):
            raise UsageError(
                f"{name} must be given, but it is not: add it to the settings file, or --{name}."
            )


def _check_out(out: Path, resume: bool) -> None:
    if resume and (out / _MODEL).exists():
        raise UsageError(
            f"out must be a folder with an unfinished run to resume, but that in {out} has "
            f"finished: its model is {out / _MODEL}."
        )
    if not resume and out.is_dir():
        names = sorted(path.name for path in out.iterdir())
        found = [name for name in names if not name.startswith(UNFINISHED)]
        if found:
            raise UsageError(
                f"out must be a new or empty folder, but {out} holds {found[0]}: choose another "
                "one with --out, or go on with its run with --resume."
            )


def _arguments(settings: Mapping[str, Any], out: Path) -> MOLLMConfig:
    from mollm.trainer_config import MOLLMConfig

    options = {name: value for name, value in settings.items() if name not in _OWN}
    if settings.get("device") == "cpu":
        options["use_cpu"] = True
    elif settings.get("device", "cuda") != "cuda":
        raise UsageError(f"device must be cpu or cuda, but got {settings['device']!r}.")
    try:
        args = MOLLMConfig(output_dir=str(out), **options)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"the settings do not go together: {reason}.") from error
    if settings.get("device") == "cuda" and args.device.type != "cuda":
        raise UsageError("device must be one that Torch finds on this machine, but got 'cuda'.")
    return args


def _trainer(settings: Mapping[str, Any], args: MOLLMConfig) -> MOLLMTrainer:
    from mollm.trainer import MOLLMTrainer

    adapter = _adapter(settings.get("lora"))
    args.refuse_four_bits_without(adapter)
    _check_memory(settings["model"], args, adapter)
    evaluated = {
        name: settings[f"eval_{name}"]
        for name in ("forget", "retain")
        if f"eval_{name}" in settings
    }
    return MOLLMTrainer(
        settings["model"],
        args,
        forget_dataset=settings["forget"],
        retain_dataset=settings["retain"],
        eval_dataset=evaluated or None,
        peft_config=adapter,
    )


def _adapter(lora: Any) -> Any:
    if not lora:
        return None
    from peft import LoraConfig

    options = {"r": lora} if isinstance(lora, int) and lora is not True else lora
    try:
        rank = options.get("r", 8)
        return LoraConfig(
            **{"target_modules": "all-linear", "lora_alpha": 2 * rank, **options},
            task_type="CAUSAL_LM",
        )
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"lora must be a rank or options of peft.LoraConfig, but got {lora!r}: {reason}."
        ) from error


def _check_memory(model: str, args: MOLLMConfig, adapter: Any | None) -> None:
    """Compares what `mollm plan` predicts with the device's memory, before weights are loaded.

    A model that is not planned passes, and so do a device whose memory is not known and several
    processes, of which each may hold a part.

    Raises:
        UsageError: Even what is there throughout does not fit.
    """
    from mollm import machine, models, plan

    config, label = models.load_config(model)
    memory = machine.available_memory_gb(args.device) * machine.GB
    if args.device.type not in plan.DEVICES or math.isinf(memory) or args.world_size > 1:
        return
    settings = plan_settings(args, adapter)
    context = getattr(config, "max_position_embeddings", None) or settings.sequence_length
    settings = replace(settings, sequence_length=min(context, settings.sequence_length))
    try:
        planned = plan.plan(plan.shape_of(config, label), settings)
    except UsageError:  # of another family
        return
    way_out = f"see what would fit with `{plan_line(model, settings)}`."
    there = f"{memory / plan.GIB:.2f} GiB are available on {settings.device}"
    lasting = sum(planned.component(name) for name in _LASTING)
    if lasting > memory:
        raise UsageError(
            f"the model {label} must fit into memory, but with its reference and the optimizer's "
            f"state it takes {lasting / plan.GIB:.2f} GiB, and {there}: {way_out}"
        )
    if not planned.fits(memory):
        logger.warning(
            f"A step with rows of {settings.sequence_length} tokens, the longest that max_length "
            f"allows, would take {planned.peak.total / plan.GIB:.2f} GiB, but only {there}: "
            f"{way_out}"
        )


def plan_settings(args: MOLLMConfig, adapter: Any | None) -> PlanSettings:
    """A run as `mollm plan` sees it, with the longest rows that it allows.

    Args:
        args: Its settings.
        adapter: The LoraConfig that it trains, or None.

    Raises:
        UsageError: A setting is one that no run can have.
    """
    from mollm import models
    from mollm.plan import PER_OBJECTIVE, PlanSettings

    options = args.optimizer_options
    momentum = options.get("momentum")
    original = "copy" if adapter is None else "adapter"
    return PlanSettings(
        batch_size=args.per_device_train_batch_size,
        sequence_length=args.max_length,
        accumulation=args.gradient_accumulation_steps,
        dtype=args.dtype,
        compute_dtype="bfloat16" if models.autocast(args.device)._enabled else "float32",
        state_dtype=options.get("state_dtype"),
        gradient_memory=options.get("gradient_memory", "as-produced"),
        momentum=momentum if momentum == PER_OBJECTIVE else None,
        metric=args.for_optimizer()["metric"],
        reference=original if args.reference == "auto" else args.reference,
        lora_rank=0 if adapter is None else adapter.r,
        quantization=args.quantization,
        gradient_checkpointing=args.gradient_checkpointing,
        freeze_embeddings=args.freeze_embeddings,
        optimizer=options.get("base", "adamw"),
        device=args.device.type,
    )


def plan_line(model: str, settings: PlanSettings) -> str:
    """The command that plans a run."""
    words = ["mollm", "plan", "--model", model]
    for option in fields(settings):
        value = getattr(settings, option.name)
        if value is not None and value is not False:
            words.append(f"--{option.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)


def _run(trainer: MOLLMTrainer, settings: Mapping[str, Any], out: Path, resume: bool) -> int:
    from mollm import checkpoint, processes

    def tell(text: str) -> None:
        if processes.rank() == 0:
            print(text)

    trainer.train(resume_from_checkpoint=resume and bool(checkpoint.checkpoints(out)))
    tell(summary(trainer))
    if trainer.stopped_because is not None:
        found = checkpoint.checkpoints(out)
        last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint"
        tell(f"Stopped early, and wrote no model; {last}.")
        return _STOPPED
    with processes.on_the_first(complete(out / _MODEL)) as folder:
        trainer.export(folder or out)
        if folder is not None:
            (folder / "README.md").write_text(trainer.model_card(), encoding="utf-8")
    tell(f"Model: {out / _MODEL}   History: {out / 'history.jsonl'}   Card: README.md beside both")
    tell(f"Next: {evaluate_line(settings, out)}")
    return 0


def evaluate_line(settings: Mapping[str, Any], out: Path) -> str:
    """The command that measures the model of a run."""
    words = ["mollm", "evaluate", "--model", str(out / _MODEL), "--original", settings["model"]]
    for name in ("forget", "retain"):
        data = settings[name]
        words += [f"--{name}", data if isinstance(data, str) else json.dumps(data)]
    return shlex.join(words)


def summary(trainer: MOLLMTrainer) -> str:
    """Losses, weights and conflicts of a run as a table for the terminal."""
    from mollm.step import OBJECTIVES

    history = trainer.history
    if not history:
        return "No step was made."
    rows = [
        f"{'objective':<12}{'first loss':>12}{'last loss':>12}{'mean weight':>14}{'climbed':>10}"
    ]
    for name in OBJECTIVES:
        first, last = history[0].losses[name], history[-1].losses[name]
        weight = sum(record.weights[name] for record in history) / len(history)
        climbed = sum(record.conflicts.get(name, False) for record in history) / len(history)
        rows.append(f"{name:<12}{first:>12.4f}{last:>12.4f}{weight:>14.4f}{climbed:>10.0%}")
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    if evaluated:
        shown = {k: v for k, v in evaluated[-1].items() if k.endswith("_loss")}
        rows.append("   ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return f"\n{len(history)} steps\n" + "\n".join(rows)
