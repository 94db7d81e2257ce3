"""Settings that do nothing beside others of the same run: what is refused, and what is said.

A setting that somebody chose and that the run would ignore is refused where it is about how the
model trains. Where it is about what is logged, evaluated and kept, or another setting overrules it
as in transformers, the trainer says so and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import IntervalStrategy, SchedulerType
from transformers.trainer_utils import SaveStrategy

from mollm.errors import UsageError
from mollm.methods import unlearning_cross_entropy
from mollm.optim.bases import FusedBase
from mollm.optim.constants import PER_OBJECTIVE
from mollm.training.setting_roles import plain

if TYPE_CHECKING:
    from mollm.optim.optimizer import MOLLMOptimizer
    from mollm.training.config import MOLLMConfig

_SAME_IN_OPTIONS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "preferences": "preferences",
}
"""Settings of which optimizer_options may say the same."""
_OF_THE_RUN = ("params", "objectives")
_OFF: tuple[Any, ...] = (None, False, 0, "", "no", [], {})
_OF_A_REPORT = (
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)


def chosen(args: MOLLMConfig) -> dict[str, Any]:
    """The settings that are not what they are by default, None and False taken for it where it is
    no more than these or "no"."""
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(args)
    }
    values = {name: getattr(args, name) for name in defaults}
    return {n: v for n, v in values.items() if v != defaults[n] and (v or defaults[n] not in _OFF)}


def refuse_idle(args: MOLLMConfig) -> None:
    """Refuses settings of the training that would do nothing beside the others.

    Raises:
        UsageError: There is one.
    """
    mine, options = chosen(args), args.optimizer_options
    for name, beside, instead in _idle(args):
        if name in mine:
            raise UsageError(f"{name} must be left out {beside}, but got {mine[name]}: {instead}.")
    for name in _OF_THE_RUN:
        if name in options:
            raise UsageError(
                f"{name} must be left out of optimizer_options, but got {options[name]!r}: a run "
                "has its own."
            )
    for name, same in _SAME_IN_OPTIONS.items():
        if name in mine and same in options:
            raise UsageError(
                f"{name} must be left out with {same} in optimizer_options, which takes its place, "
                f"but got {mine[name]} and {options[same]}: give one of them."
            )


def _idle(args: MOLLMConfig) -> Iterator[tuple[str, str, str]]:
    """(setting, beside what it would do nothing, the way out)."""
    if args.chosen_method.forget_loss is not unlearning_cross_entropy:
        beside = f"with the method {args.method}, which does not use it"
        yield "uce_eps", beside, "leave it out, or choose another method"
    if not args.relearn_steps:
        yield "relearn_lr", "without relearn_steps", "give relearn_steps, such as 3"
    if args.lr_scheduler_type == SchedulerType.CONSTANT:
        for name in ("warmup_steps", "warmup_ratio"):
            beside = "with the schedule constant, which has no warm-up"
            yield name, beside, "choose lr_scheduler_type constant_with_warmup"
    if not args.gradient_checkpointing:
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            yield name, "without gradient_checkpointing", "switch that on"
    if args.eval_strategy == IntervalStrategy.NO:
        beside, instead = "with the eval_strategy no", "choose another, and a save_strategy"
        yield "load_best_model_at_end", beside, instead
    if args.base != "adamw":
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            beside = "with a base that is not adamw"
            yield name, beside, "give the base's own options in optimizer_options"


def refuse_idle_options(args: MOLLMConfig, optimizer: MOLLMOptimizer) -> None:
    """Refuses options of an optimizer, which they made, that do nothing in it.

    Raises:
        UsageError: There is one.
    """
    options = args.optimizer_options
    for name, beside, instead in _idle_options(args, optimizer):
        value = options.get(name)
        if value is not None and value is not False:
            raise UsageError(
                f"{name} must be left out of optimizer_options {beside}, but got "
                f"{value!r}: {instead}."
            )


def _idle_options(args: MOLLMConfig, optimizer: MOLLMOptimizer) -> Iterator[tuple[str, str, str]]:
    if args.base == "sgd":
        yield "metric", "with the base sgd, whose metric is euclidean anyway", "leave it out"
    fused = optimizer.base if isinstance(args.base, str) else None
    if isinstance(fused, FusedBase) and not fused.keeps_state:
        yield "state_dtype", "where the base keeps no state", "leave it out"


def refuse_idle_rounding(args: MOLLMConfig, optimizer: MOLLMOptimizer) -> None:
    """Refuses stochastic rounding where nothing that a step writes is in bfloat16.

    Raises:
        UsageError: It is so.
    """
    options, base = args.optimizer_options, optimizer.base
    if not options.get("stochastic_rounding") or not isinstance(base, FusedBase):
        return
    written = base.kept_dtypes() | {p.dtype for g in base.param_groups for p in g["params"]}
    narrow_means = (
        options.get("momentum") == PER_OBJECTIVE and options.get("gradient_memory") == "bfloat16"
    )
    if torch.bfloat16 not in written and not narrow_means:
        raise UsageError(
            "stochastic_rounding must be left out of optimizer_options where neither weights nor "
            f"state are in bfloat16, but got {options['stochastic_rounding']}: leave it out, or "
            "load the model in bfloat16."
        )


def refuse_idle_of_model(args: MOLLMConfig, *, adapter: bool, as_module: bool) -> None:
    """Refuses settings that do nothing with the model of the run.

    Args:
        args: The settings.
        adapter: Whether an adapter trains in place of the weights.
        as_module: Whether the model was given as a module and not by name.

    Raises:
        UsageError: There is one.
    """
    mine = chosen(args)
    if as_module and "dtype" in mine:
        raise UsageError(
            f"dtype must be left out for a model that is given as a module, but got {args.dtype}: "
            "load that in it, or give its name."
        )
    if adapter and "freeze_embeddings" in mine:
        raise UsageError(
            "freeze_embeddings must be left out with an adapter, which trains in place of the "
            f"weights, but got {args.freeze_embeddings}: leave it out."
        )
    if adapter and args.trainable_parameters:
        raise UsageError(
            "trainable_parameters must be left out with an adapter, which trains in place of the "
            f"weights, but got {args.trainable_parameters}: choose the adapter's target_modules."
        )


def idle_notes(args: MOLLMConfig) -> list[str]:
    """A sentence for each setting that does nothing beside the others, but is not refused."""
    mine = chosen(args)
    notes = [
        f"{name} is {plain(mine[name])}, which does nothing {beside}."
        for name, beside in _overruled(args)
        if mine.get(name) or mine.get(name) is False  # 0 steps, or none, are a way to say off
    ]
    if args.max_steps > 0 and args.lr_scheduler_type != SchedulerType.CONSTANT:
        warm = args.get_warmup_steps(args.max_steps)
        if warm >= args.max_steps:
            notes.append(
                f"the run ends after {args.max_steps} steps, within the {warm} steps of warm-up, "
                "and never reaches its learning rate."
            )
    return notes


def _overruled(args: MOLLMConfig) -> Iterator[tuple[str, str]]:
    """(setting, beside what it does nothing)."""
    if args.max_steps > 0:
        yield "num_train_epochs", "beside max_steps"
    if args.eval_strategy == IntervalStrategy.NO:
        given = args.metric_for_best_model is not None
        best = "metric_for_best_model" if given else "greater_is_better"
        for name in ("eval_delay", best):
            yield name, "with the eval_strategy no"
    if args.eval_strategy != IntervalStrategy.STEPS:
        yield "eval_steps", f"with the eval_strategy {args.eval_strategy.value}"
    if args.save_strategy != SaveStrategy.STEPS:
        yield "save_steps", f"with the save_strategy {args.save_strategy.value}"
    if args.save_strategy == SaveStrategy.NO:
        yield "save_total_limit", "with the save_strategy no"
    if args.logging_strategy != IntervalStrategy.STEPS and args.eval_steps != args.logging_steps:
        yield "logging_steps", f"with the logging_strategy {args.logging_strategy.value}"
    if not args.report_to:
        for name in _OF_A_REPORT:
            yield name, "without report_to"
