"""MOLLMConfig: `transformers.TrainingArguments` with what unlearning adds."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import IntervalStrategy, SchedulerType, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy

from mollm.data.chat import TRAIN_ON_TURNS
from mollm.data.encoding import CUT, LONG_ROWS
from mollm.data.prompt_format import ANSWER, PromptFormat
from mollm.distributed.watch import await_others
from mollm.errors import UsageError, did_you_mean
from mollm.methods import METHODS, ForgetLoss, Method, find_method, unlearning_cross_entropy
from mollm.methods.method import OBJECTIVES, role_of_objective
from mollm.models.four_bits import NF4
from mollm.models.trainable import read_parts
from mollm.optim.constants import EIGHT_BITS, STREAMED
from mollm.optim.directions import uses_normalize, uses_preferences
from mollm.optim.idle_options import FIRST_BETA, IdleOptionError
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.system.parsing import parse_yaml, reason_of
from mollm.system.precision import COMPUTE_DTYPES, DTYPES, compute_dtype, computing_in
from mollm.training.idle_settings import chosen, refuse_idle, refuse_idle_options
from mollm.training.reference_model import REFERENCES
from mollm.training.setting_roles import UNSUPPORTED, plain

_SIDES = ("left", "right")
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_SHARDINGS = ("full_shard", "hybrid_shard")
_ENUMERATIONS: dict[str, type[Enum]] = {
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
}
"""Fields of which transformers takes one of a few words; of others they are unsupported here."""
_REPORTED = (
    "method",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "freeze_embeddings",
    "seed",
)
NOT_REPORTED = (
    "output_dir",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "disable_tqdm",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "hub_token",
    "report_to",
    "run_name",
    "sample_replies",
    "use_cpu",
)
"""What readers of a model card need not know."""
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_PLAIN = (bool, int, float, str, list, dict)
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_retain_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
_POSITIVE = (
    "learning_rate",
    "max_loss_rise",
    "relearn_lr",
)
_STEPS = {
    "logging_steps": "logging_strategy",
    "save_steps": "save_strategy",
    "eval_steps": "eval_strategy",
}
"""Steps between two of something, with what says whether it goes by steps."""
_NOT_NEGATIVE = (
    "sample_replies",
    "weight_decay",
    "max_grad_norm",
    "adam_epsilon",
    "warmup_steps",
    "relearn_steps",
    "eval_delay",
)
_OF_THE_OPTIMIZER = ("preferences", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Settings that MOLLMOptimizer checks, beside optimizer_options."""
_FORGET_IS_ONE = ("retain-first", "forget-first")
"""Directions in which the first gradient is that of all that is to be forgotten."""
_BY_A_METRIC = ("reduce_lr_on_plateau", "greedy")
_WORDS = dict.fromkeys(("true", "yes", "on", "1"), True)
_WORDS |= dict.fromkeys(("false", "no", "off", "0"), False)
_SWITCHES = ("normalize", "track_conflicts", "stochastic_rounding", "nesterov")
"""Of optimizer_options."""
_BY_NAME = ("method_options", "chat_template_kwargs", "optimizer_options", "stop_when")
if TYPE_CHECKING:
    Options = dict[str, Any]
    Preferences = list[float] | dict[str, float]
    Format = str | dict[str, Any]
    Parts = list[str]
    Sharding = Any
else:  # for HfArgumentParser, which reads what stands second in a union with None
    Options = dict[str, Any] | str | None
    Preferences = list[float] | str | dict[str, float] | None
    Format = dict[str, Any] | str | None
    Parts = list[str] | str | None
    Sharding = list[str] | str | None | Any


@dataclass
class MOLLMConfig(TrainingArguments):  # type: ignore[misc]
    """Settings of a MOLLMTrainer: those of `TrainingArguments`, with a few more and other defaults.

    On each process a step sees `per_device_train_batch_size` x `gradient_accumulation_steps` rows
    to forget, and as many to retain or, with `per_device_retain_batch_size`, another number of
    these; epochs are counted in rows to forget. Matrix products are in bfloat16 where the device
    computes in it natively.

    `fsdp="full_shard"`, or True, cuts the model into parts over all processes, "hybrid_shard" over
    those of a node; without it every process holds a copy. See `mollm.distributed.processes`.
    Of a model given by name the first process alone reads the weights, for which `ddp_timeout`
    must leave time.

    Raises:
        UsageError: A value is out of range, or an option does not go with unlearning.

    Example:
        >>> config = MOLLMConfig(output_dir="runs/forget", max_steps=100)
        >>> config.method, config.uce_eps, config.reference
        ('mollm', 0.0001, 'auto')
        >>> MOLLMConfig(output_dir="runs/forget", uce_eps=2)
        Traceback (most recent call last):
        mollm.errors.UsageError: uce_eps must be between 0 and 1, but got 2.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "learning rate of the first step"})
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "largest norm of the common direction; 0 does not clip, and saves memory"
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "steps between logs"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})

    fsdp: Sharding = field(
        default=None,
        metadata={"help": "full_shard or hybrid_shard: processes hold parts of the model"},
    )
    if TYPE_CHECKING:  # of TrainingArguments, and set again below
        lr_scheduler_kwargs: Any = None
        report_to: Any = None

    method: str = field(
        default="mollm", metadata={"help": "how to unlearn, one of mollm.methods.METHODS"}
    )
    method_options: Options = field(
        default_factory=dict,
        metadata={"help": "hyperparameters of the method, such as {beta: 0.2} of npo"},
    )
    preferences: Preferences | None = field(
        default=None,
        metadata={
            "help": "weights of forget, kl and retain, or of objectives by name, such as "
            "{kl: 20, retain_code: 2}; for methods that take any"
        },
    )
    relearn_steps: int = field(
        default=0,
        metadata={
            "help": "steps of an attacker that learns forgotten rows again, before each forget "
            "loss; 3 makes forgetting last, at about twice the cost of a step"
        },
    )
    relearn_lr: float = field(
        default=3e-3, metadata={"help": "learning rate of that attacker; longer steps than his own"}
    )
    uce_eps: float = field(
        default=1e-4,
        metadata={"help": "UCE's epsilon; smaller pushes harder on memorised answers"},
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "reference model: adapter, copy, cache, or auto, which takes the adapter if any"
        },
    )
    per_device_retain_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "retain examples per micro-batch (default: per_device_train_batch_size, which "
            "is that of the forget examples)"
        },
    )
    max_length: int = field(default=1024, metadata={"help": "tokens per example, at most"})
    train_on_turns: str = field(
        default="last",
        metadata={"help": "last or all: which answers of a conversation carry a loss"},
    )
    long_rows: str = field(
        default=CUT,
        metadata={
            "help": "cut: prompts that are too long lose their beginning; skip: such rows are left "
            "out"
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "system prompt of conversations without one"},
    )
    chat_template_kwargs: Options | None = field(
        default=None,
        metadata={"help": "options of the chat template, such as {enable_thinking: false}"},
    )
    prompt_format: Format | None = field(
        default=None,
        metadata={
            "help": "none for plain text, chat, or a template such as "
            "'Q: {question} A: {answer}'; with more options {template: ..., prefix: ..., stop: ...}"
        },
    )
    padding_side: str = field(default="right", metadata={"help": "left or right"})
    dtype: str = field(
        default="float32", metadata={"help": "weight dtype of a model given by name"}
    )
    compute_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of matrix products: auto (bfloat16 if the device has instructions "
            "for it), float32 (that of the weights) or bfloat16"
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "nf4: a model given by name is loaded in 4 bits, for an adapter (QLoRA)"},
    )
    freeze_embeddings: bool = field(
        default=True, metadata={"help": "do not train token embeddings and head"}
    )
    trainable_parameters: Parts | None = field(
        default=None,
        metadata={
            "help": "train only parameters with one of these in their names, such as .mlp. "
            "(default: all of them)"
        },
    )
    optimizer_options: Options = field(
        default_factory=dict,
        metadata={
            "help": "options of MOLLMOptimizer: base, metric, momentum, gradient_memory, ..."
        },
    )
    stop_when: Options | None = field(
        default=None,
        metadata={
            "help": "end the run at a target: {forget_probability: 0.1, retain_probability: 0.5, "
            "steps: 10}"
        },
    )
    sample_replies: int = field(
        default=0,
        metadata={"help": "questions of each set to ask before and after, for the report"},
    )
    max_loss_rise: float = field(
        default=5.0,
        metadata={"help": "stop once KL, or the rise of the retain loss, exceeds this many nats"},
    )

    def __post_init__(self) -> None:
        self._read_texts()
        self.optimizer_options = {
            name: str(value).removeprefix("torch.") if name == "state_dtype" and value else value
            for name, value in (self.optimizer_options or {}).items()
        }
        self._refuse_other_options()
        self._refuse_launchers()
        for name, kind in _ENUMERATIONS.items():
            setattr(self, name, _enumerated(name, getattr(self, name), kind))
        self._refuse_unusable_numbers()
        self._refuse_unusable_steps()
        if self.save_total_limit is not None and self.save_total_limit <= 0:
            self.save_total_limit = None  # as in transformers, all are kept
        self.sharding = _sharding(self.fsdp)
        # Accelerate, which transformers would hand it on to, is not to wrap the model.
        self.fsdp = None
        for name in ("log_level", "log_level_replica"):
            _one_of(name, getattr(self, name), _LOG_LEVELS)
        self._refuse_unlike_strategies()
        await_others()
        if getattr(self, "report_to", None) in (None, False):  # to YAML, no is nothing
            self.report_to = "none"
        try:
            super().__post_init__()
        except ValueError as error:
            raise UsageError(
                "the settings must suit the TrainingArguments of transformers, but they do not: "
                f"{reason_of(error, None)}."
            ) from error
        if self.sharding and self.world_size == 1:
            raise UsageError(
                f"fsdp must be left out of a run of one process, but got {self.sharding}: start "
                "several with torchrun."
            )
        if self.sharding == "hybrid_shard" and "LOCAL_WORLD_SIZE" not in os.environ:
            raise UsageError(
                "fsdp must be full_shard where the launcher does not say how many processes a node "
                "has, but got hybrid_shard: use torchrun, or set LOCAL_WORLD_SIZE."
            )
        if self.stop_when is not None:
            self._check_stop_when(self.stop_when)
        for name in ("stop_when", "sample_replies"):
            if getattr(self, name) and self.sharding:
                raise UsageError(
                    f"{name} must be left out where processes hold parts of the model, but got "
                    f"{getattr(self, name)} with {self.sharding}."
                )
        _one_of("method", self.method, METHODS)
        self._check_method_options()
        _one_of("reference", self.reference, REFERENCES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _one_of("padding_side", self.padding_side, _SIDES)
        _one_of("long_rows", self.long_rows, LONG_ROWS)
        _one_of("train_on_turns", self.train_on_turns, TRAIN_ON_TURNS)
        if not isinstance(self.system_prompt, str | None):
            raise UsageError(f"system_prompt must be a text, but got {self.system_prompt!r}.")
        PromptFormat.of(self.prompt_format)  # refuses what is none
        self.quantization = self.quantization or None
        if self.quantization:
            _one_of("quantization", self.quantization, (NF4,))
            if self.sharding:
                raise UsageError(
                    f"quantization must be left out where processes hold parts of the model, but "
                    f"got {self.quantization} with {self.sharding}: give each a copy."
                )
        epochs = self.num_train_epochs
        if self.max_steps <= 0 and not (math.isfinite(epochs) and epochs > 0):
            raise UsageError(
                "num_train_epochs must be a positive number where max_steps is not given, but got "
                f"{epochs}."
            )
        if self.save_strategy == SaveStrategy.BEST and self.eval_strategy == IntervalStrategy.NO:
            raise UsageError("eval_strategy must be given for the save_strategy best, but got no.")
        if self.lr_scheduler_type in _BY_A_METRIC:
            raise UsageError(
                "lr_scheduler_type must be one that goes by the step, but got "
                f"{SchedulerType(self.lr_scheduler_type).value}."
            )
        self._check_schedule()
        refuse_idle(self)
        self._refuse_unknown_reports()
        with computing_in(self.compute_dtype):
            computes = compute_dtype(self.device).dtype
        if self.bf16 and computes != torch.bfloat16:
            raise UsageError(
                f"bf16 must be left out where the device does not compute in it natively, but got "
                f"it on {self.device}."
            )
        self._try_optimizer()

    def _read_texts(self) -> None:
        """What a command line gives as a text, in YAML or JSON, becomes what the text says."""
        for name in (*_BY_NAME, "preferences"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = parse_yaml(value, name)
                setattr(self, name, value)
            if name in _BY_NAME and not isinstance(value or {}, Mapping):
                raise UsageError(f"{name} must be options by name, but got {value!r}.")
        if not isinstance(self.preferences, list | tuple | Mapping | None):
            raise UsageError(
                "preferences must be numbers, such as [1, 20, 1] or {kl: 20}, but got "
                f"{self.preferences!r}."
            )
        self.trainable_parameters = list(read_parts(self.trainable_parameters)) or None
        text = self.prompt_format
        if isinstance(text, str) and text.startswith("{") and not text.endswith(ANSWER):
            self.prompt_format = parse_yaml(text, "prompt_format")

    def _check_method_options(self) -> None:
        self.method_options = _numbers(dict(self.method_options or {}))
        eps = self.chosen_options.get("eps")
        if self._takes_uce_eps and "eps" in self.method_options:
            if not isinstance(eps, float) or not 0 < eps < 1:
                raise UsageError(f"eps of {self.method} must be between 0 and 1, but got {eps}.")
            if self.uce_eps != type(self).uce_eps:
                raise UsageError(
                    f"uce_eps must be left out with eps in method_options, but got {self.uce_eps} "
                    f"and {eps}: they are the same."
                )
        method = self.chosen_method
        if method.alternatives and self.train_on_turns == "all":
            raise UsageError(
                f"train_on_turns must be last with the method {self.method}, which prefers another "
                "answer to the last one, but got all."
            )
        for name in method.base_options:
            if name in self.optimizer_options:
                raise UsageError(
                    f"{name} must be left out of optimizer_options with the method {self.method}, "
                    "whose hyperparameter it is, but got "
                    f"{self.optimizer_options[name]!r}: give it in method_options."
                )
        for name, function, why in (
            ("stop_when", method.finish, "which turns the model around after the last step"),
            ("trainable_parameters", method.freeze, "which chooses itself what trains"),
            ("relearn_steps", method.finish, "whose training is not to forget"),
            (
                "load_best_model_at_end",
                method.finish,
                "which turns the last model around",
            ),
            ("max_grad_norm", method.gate, "which combines gradients element by element"),
        ):
            if function is not None and getattr(self, name):
                raise UsageError(
                    f"{name} must be left out with the method {self.method}, {why}, but got "
                    f"{getattr(self, name)}."
                )

    @property
    def _takes_uce_eps(self) -> bool:
        return self.chosen_method.forget_loss is unlearning_cross_entropy

    @property
    def chosen_options(self) -> dict[str, Any]:
        """All hyperparameters of the method: the published ones, and those of `method_options`."""
        found = self.chosen_method.settings(self.method_options)
        if self._takes_uce_eps and "eps" not in self.method_options:
            found["eps"] = self.uce_eps
        return found

    def _try_optimizer(self) -> None:
        """Says now what MOLLMOptimizer would say once the model is loaded."""
        # Names of objectives are not known before the data; what they are given is.
        options = self.for_optimizer(_objectives_named(self.preferences))
        if callable(options.get("base")):  # its own options, and what it asks of parameters, wait
            known = inspect.signature(MOLLMOptimizer).parameters
            options = {name: options[name] for name in options if name in known} | {"base": "sgd"}
        try:
            optimizer = MOLLMOptimizer([nn.Parameter(torch.zeros(1))], **options)
        except IdleOptionError as error:
            name = f"{error.name} must be left out of optimizer_options"
            if error.name == FIRST_BETA and "betas" not in self.optimizer_options:
                name = "adam_beta1 must be left out"
            raise UsageError(
                f"{name} {error.beside}, but got {error.value!r}: {error.instead}."
            ) from error
        except (TypeError, ValueError) as error:
            reason = reason_of(error, None)
            mine = chosen(self)
            asked = {name: mine[name] for name in _OF_THE_OPTIMIZER if name in mine}
            asked |= self.optimizer_options
            told = ", ".join(f"{n}={value!r}" for n, value in asked.items() if value is not None)
            raise UsageError(
                f"the optimizer's settings must suit MOLLMOptimizer, but got {told}: {reason}."
            ) from error
        refuse_idle_options(self, optimizer)
        if optimizer.streams:
            self._refuse_with_streaming()
        if self.sharding and self.optimizer_options.get("state_dtype") == EIGHT_BITS:
            raise UsageError(
                f"state_dtype must not be {EIGHT_BITS} with fsdp, whose checkpoints could not cut "
                f"its scales, but got {self.sharding}: choose bfloat16."
            )
        if self.max_grad_norm > 0 and not optimizer.can_aggregate:
            raise UsageError(
                f"max_grad_norm must be 0 with momentum='per-objective' in AdamW's metric, but got "
                f"{self.max_grad_norm}: leave it out, or add metric='euclidean' to "
                "optimizer_options."
            )

    def _refuse_with_streaming(self) -> None:
        streamed = "with gradient_memory='streamed'"
        method = self.chosen_method
        if method.gate is not None or method.freeze is not None:
            raise UsageError(
                f"gradient_memory must be another one than {STREAMED!r} with the method "
                f"{self.method}, which reads more than a streamed step holds: leave it out."
            )
        if callable(self.base):
            raise UsageError(
                f"base must be adamw or sgd {streamed}, but got {plain(self.base)}, which "
                "wants all gradients at once."
            )
        if self.max_grad_norm > 0:
            raise UsageError(
                f"max_grad_norm must be 0 {streamed}, where no gradient is ever there as a whole, "
                f"but got {self.max_grad_norm}: leave it out."
            )
        if self.relearn_steps:
            raise UsageError(
                f"relearn_steps must be 0 {streamed}, whose gradients are taken once the weights "
                f"are put back, but got {self.relearn_steps}: leave it out."
            )
        if self.gradient_checkpointing:
            raise UsageError(
                f"gradient_checkpointing must be left out {streamed}, which computes every block "
                "again anyway, but got True."
            )

        if self.sharding and not self.freeze_embeddings:
            raise UsageError(
                f"freeze_embeddings must be True {streamed} and fsdp, but got "
                f"{self.freeze_embeddings}: leave it out, or leave {self.sharding} out."
            )

    @property
    def streams(self) -> bool:
        """Whether gradients are made block by block, see `MOLLMOptimizer.streamed`."""
        return bool(self.optimizer_options.get("gradient_memory") == STREAMED)

    def refuse_streaming_with(self, adapter: Any | None) -> None:
        """Says that an adapter has nothing to stream.

        Raises:
            UsageError: There is one, and its gradients are to be streamed.
        """
        if self.streams and adapter is not None:
            raise UsageError(
                f"gradient_memory must be another one than {STREAMED!r} with an adapter, whose "
                "gradients take next to no memory as they are: leave it out."
            )

    def refuse_method_with(self, adapter: Any | None, *, as_given: bool) -> None:
        """Says what of the method does not go with an adapter.

        Args:
            adapter: What trains in place of the weights, or None.
            as_given: Whether the model came with it.

        Raises:
            UsageError: The method turns the change around, whose beginning a given adapter does
                not tell, or options choose matrices to train.
        """
        method = self.chosen_method
        if method.finish is not None and as_given:
            raise UsageError(
                f"the method {method.name} must have a model without an adapter of its own, "
                "whose change it could not turn around, but got a PeftModel: merge it first."
            )
        unused = [name for name in method.of_freezing if name in self.method_options]
        if unused and adapter is not None:
            raise UsageError(
                f"{unused[0]} of {self.method} must be left out with an adapter, all of which "
                f"trains, but got {self.method_options[unused[0]]!r}."
            )

    def require_adapter_if_quantized(self, adapter: Any | None) -> None:
        """Says that nothing but an adapter trains beside matrices in 4 bits.

        Raises:
            UsageError: There are to be such matrices, but no adapter.
        """
        if self.quantization and adapter is None:
            raise UsageError(
                f"quantization must go with an adapter, for nothing else trains in 4 bits, but got "
                f"{self.quantization} alone: give peft_config, or --lora."
            )

    def _refuse_unlike_strategies(self) -> None:
        evaluates, saves = self.eval_strategy, self.save_strategy
        best = self.load_best_model_at_end and saves != SaveStrategy.BEST
        if best and evaluates.value != saves.value:
            raise UsageError(
                "save_strategy must be that of evaluations with load_best_model_at_end, or best, "
                f"but got {saves.value} and eval_strategy {evaluates.value}."
            )
        if best and evaluates == IntervalStrategy.STEPS:
            every = self.eval_steps or self.logging_steps
            times = self.save_steps / every
            if (self.save_steps < 1) != (every < 1) or not math.isclose(times, round(times)):
                raise UsageError(
                    "save_steps must be a multiple of eval_steps with load_best_model_at_end, but "
                    f"got {self.save_steps} and {every}."
                )

    def _check_stop_when(self, told: Any) -> None:
        from mollm.training.targets import StopRule

        self.stop_when = _numbers(told)
        StopRule.of(self.stop_when)
        if self.load_best_model_at_end:
            raise UsageError(
                "load_best_model_at_end must be left out with stop_when, whose target the last "
                "model has reached, not the best one, but got True."
            )

    def _refuse_launchers(self) -> None:
        for engine in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
                raise UsageError(
                    "accelerate must launch processes of type MULTI_GPU, but it was told to use "
                    f"{engine}: change its configuration, and choose fsdp in that of the run."
                )

    def _refuse_other_options(self) -> None:
        mine = chosen(self)
        for name, instead in UNSUPPORTED.items():
            if name in mine:
                raise UsageError(
                    f"{name} must be left out of a MOLLMConfig, but got {mine[name]}: {instead}."
                )

    def _check_schedule(self) -> None:
        """Tries the schedule of learning rates out, whose options transformers looks at late."""
        given, name = self.lr_scheduler_kwargs, SchedulerType(self.lr_scheduler_type).value
        if not isinstance(given, dict | None):
            raise UsageError(f"lr_scheduler_kwargs must be options by name, but got {given!r}.")
        given = self.lr_scheduler_kwargs = given and _numbers(given)
        if given and name in _WITHOUT_OPTIONS:
            raise UsageError(
                f"lr_scheduler_kwargs must be left out with the schedule {name}, which has none, "
                f"but got {given}."
            )
        steps = self.max_steps if self.max_steps > 0 else 1000
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        try:
            made = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=self.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=given,
            )
            rates = [float(made.lr_lambdas[0](step)) for step in (0, 1, steps // 2, steps - 1)]
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"lr_scheduler_kwargs must be options of the schedule {name}, but got {given}: "
                f"{reason_of(error)}."
            ) from error
        if not all(0 <= rate < math.inf for rate in rates):
            raise UsageError(
                f"lr_scheduler_kwargs must make learning rates that are finite and not negative, "
                f"but {given} make {name} change the learning rate by {rates}."
            )

    def _refuse_unusable_numbers(self) -> None:
        """Texts that are numbers become such; NaN, infinity and what is out of range is refused."""
        self.optimizer_options = {
            name: _switch(name, value) if name in _SWITCHES else value
            for name, value in _numbers(self.optimizer_options or {}).items()
        }
        self.preferences = _numbers(self.preferences)
        for f in fields(self):
            value = getattr(self, f.name)
            kind = _DECLARED.get(f.name, f.type)
            setattr(self, f.name, _as_declared(f.name, kind, f.default, value))
            _refuse_not_finite(f.name, getattr(self, f.name))
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise UsageError(f"{name} must be in [0, 2**32), but got {getattr(self, name)}.")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            left_out = value is None and name == "per_device_retain_batch_size"
            if not left_out and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number from 1, but got {value}.")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UsageError(
                    f"{name} must be a positive number, but got {getattr(self, name)}."
                )
        if self.max_steps != -1 and self.max_steps < 1:
            raise UsageError(
                "max_steps must be at least 1, or -1 where num_train_epochs decides, but got "
                f"{self.max_steps}."
            )
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} must not be negative, but got {getattr(self, name)}.")
        if not 0 < self.uce_eps < 1:
            raise UsageError(f"uce_eps must be between 0 and 1, but got {self.uce_eps}.")
        decay = self.optimizer_options.get("weight_decay", self.weight_decay)
        if isinstance(decay, int | float) and self.learning_rate * decay >= 1:
            raise UsageError(
                f"weight_decay must be less than 1 / learning_rate, {1 / self.learning_rate:g}, or "
                f"a step would turn weights around, but got {decay:g}."
            )

    def _refuse_unusable_steps(self) -> None:
        """Of what does not go by steps nothing reads their number, so that 0 and None are taken."""
        for name, strategy in _STEPS.items():
            if getattr(self, strategy).value != "steps":
                continue
            if name == "eval_steps" and self.eval_steps is None:
                name = "logging_steps"  # which transformers takes then
            value = getattr(self, name)
            if value is None or not value > 0:
                raise UsageError(
                    f"{name} must be a positive number with the {strategy} steps, but got {value}."
                )

    def _refuse_unknown_reports(self) -> None:
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
        )

        asked = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in asked:
            if name in ("all", "none"):
                continue
            if name not in INTEGRATION_TO_CALLBACK:
                raise UsageError(
                    f"report_to must be none, all or some of {', '.join(INTEGRATION_TO_CALLBACK)}, "
                    f"but got {name!r}{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
                )
            if name not in get_available_reporting_integrations():
                raise UsageError(
                    f"report_to must name what is installed, but the package of {name} is not: "
                    "install it, or leave it out."
                )

    @property
    def chosen_method(self) -> Method:
        """The method by that name."""
        return find_method(self.method)

    @property
    def forget_loss(self) -> ForgetLoss:
        """That of the method with its hyperparameters."""
        method = self.chosen_method
        return method.bound(method.forget_loss, self.chosen_options)

    @property
    def base(self) -> Any:
        """The base of MOLLMOptimizer: as asked for, or the method's own."""
        own = self.chosen_method.options.get("base", "adamw")
        return self.optimizer_options.get("base", own)

    @property
    def rows_per_step(self) -> dict[str, int]:
        """Rows of the forget and of the retain set in a step of all processes."""
        steps = self.gradient_accumulation_steps * self.world_size
        forget = self.per_device_train_batch_size
        retain = self.per_device_retain_batch_size or forget
        return {"forget": forget * steps, "retain": retain * steps}

    def reported_settings(self) -> dict[str, Any]:
        """What a reader of the model card wants to know: the most telling, and what was changed."""
        told = {name: getattr(self, name) for name in _REPORTED}
        told |= {"method_options": self.chosen_options} if self.chosen_options else {}
        if self.world_size > 1:
            told |= {"processes": self.world_size, "fsdp": self.sharding or "off"}
        for f in fields(self):
            value = getattr(self, f.name)
            changed = value and isinstance(value, _PLAIN) and value != f.default
            if changed and f.name not in (*NOT_REPORTED, *told):
                told[f.name] = value
        return {name: plain(value) for name, value in told.items()}

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for loggers, which write them as JSON."""
        return {name: plain(value) for name, value in super().to_dict().items()}

    def all_settings(self) -> dict[str, Any]:
        """All settings by name, and what follows from several of them, in the words of a run."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        # What uce_eps says stays free to change.
        named = self.chosen_options
        if self._takes_uce_eps and "eps" not in self.method_options:
            del named["eps"]
        settings["method_options"] = named
        seed = self.seed if self.data_seed is None else self.data_seed
        return settings | {
            "data_seed": seed,
            "fsdp": self.sharding,
            **{f"{name} rows per step": rows for name, rows in self.rows_per_step.items()},
        }

    def for_optimizer(self, objectives: Sequence[str] = OBJECTIVES) -> dict[str, Any]:
        """Keyword arguments for MOLLMOptimizer, but for parameters.

        Args:
            objectives: Their names: forget, kl and retain, or where a role has several sets, names
                that begin with forget_ or retain_.

        Raises:
            UsageError: The preferences name another objective, or the method does not go with
                these.
        """
        options = dict(self.optimizer_options)
        if options.get("state_dtype") in DTYPES:
            options["state_dtype"] = DTYPES[options["state_dtype"]]
        if self.base == "adamw":
            betas = (self.adam_beta1, self.adam_beta2)
            options = {"betas": betas, "eps": self.adam_epsilon, **options}
        method = self.chosen_method.optimizer_options(self.chosen_options)
        direction = options.get("direction", method["direction"])
        takes_any = uses_preferences(direction) or self.chosen_method.adapt is not None
        usual = method["preferences"] if takes_any else None
        if not uses_normalize(direction):
            method.pop("normalize", None)
        preferences = self._preferences_of(objectives, usual)
        method["preferences"] = preferences
        ordered = direction in _FORGET_IS_ONE
        if ordered and sum(role_of_objective(name) == "forget" for name in objectives) > 1:
            raise UsageError(
                f"the method {self.method} must have one set to forget, but got "
                f"{', '.join(objectives)}: choose another method."
            )
        return {
            "lr": self.learning_rate,
            "objectives": tuple(objectives),
            **method,
            **options,
        }

    def _preferences_of(
        self, objectives: Sequence[str], default: Sequence[float] | None
    ) -> Sequence[float] | None:
        """One for each objective: by its name, or that of its role."""
        asked = self.preferences
        chosen = default if asked is None or isinstance(asked, Mapping) else asked
        if asked is None and default is None:
            return None
        if chosen is not None and len(chosen) != len(OBJECTIVES):
            return chosen  # which the optimizer refuses
        by_name = dict(zip(OBJECTIVES, chosen or (1.0,) * len(OBJECTIVES), strict=True))
        if isinstance(asked, Mapping):
            known = dict.fromkeys((*OBJECTIVES, *objectives))
            for name in asked:
                if name not in known:
                    raise UsageError(
                        f"preferences must be of {', '.join(known)}, but got {name!r}"
                        f"{did_you_mean(str(name), known)}"
                    )
            by_name |= asked
        return [by_name.get(name, by_name[role_of_objective(name)]) for name in objectives]


def _objectives_named(preferences: Any) -> list[str]:
    """The three objectives, or more, so that every name in the preferences is one."""
    named = [str(name) for name in preferences] if isinstance(preferences, Mapping) else []
    return [
        name
        for role in OBJECTIVES
        for name in [n for n in named if n.startswith(f"{role}_") and role != "kl"] or [role]
    ]


def _sharding(fsdp: Any) -> str | None:
    """The way to cut a model into parts that `fsdp` names, as far as it is one of ours."""
    words = " ".join(fsdp) if isinstance(fsdp, list) else fsdp
    if not words:
        return None
    if words in (True, "true", "True"):
        return _SHARDINGS[0]
    _one_of("fsdp", words, _SHARDINGS)
    return str(words)


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}{hint}")


def _enumerated(name: str, value: Any, kind: type[Enum]) -> Enum:
    """One of the words of an enumeration; None and False, as YAML reads no, are "no"."""
    words = [str(each.value) for each in kind]
    word = value.value if isinstance(value, Enum) else value
    if word in (None, False) and "no" in words:
        word = "no"
    if word not in words:
        hint = did_you_mean(str(word).lower(), words)
        raise UsageError(f"{name} must be one of {', '.join(words)}, but got {word!r}{hint}")
    return kind(word)


def _numbers(value: Any) -> Any:
    """Texts that are numbers as such: to YAML, 1e-5 is a text, for want of a point."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_numbers(item) for item in value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


_DECLARED: Mapping[str, Any] = {f.name: f.type for f in fields(MOLLMConfig)}
"""The types of the settings: HfArgumentParser takes the "| None" out of the fields themselves."""


def _as_declared(name: str, kind: Any, default: Any, value: Any) -> Any:
    """The value of a number or a switch; of a number that is a text or 3.0, the number itself.

    None is 0 where that is the default.
    """
    said = kind.__name__ if isinstance(kind, type) else str(kind)
    found = re.fullmatch(r"(?:typing\.Optional\[)?(bool|int|float)( \| None|\])?", said)
    if found is None:
        return value
    if value is None:
        needed = found[1] != "bool" and not found[2] and name not in _STEPS
        if needed and default != 0:
            raise UsageError(f"{name} must be a number, but got None: leave it out for {default}.")
        return default if needed else None
    if found[1] == "bool":
        return _switch(name, value)
    number = _number_in(value) if isinstance(value, str) else value
    if not isinstance(number, Real) or isinstance(number, bool):
        raise UsageError(f"{name} must be a number, but got {value!r}.")
    number = int(number) if isinstance(number, Integral) else float(number)
    if found[1] == "float":
        return number
    if not float(number).is_integer():
        raise UsageError(f"{name} must be a whole number, but got {value}.")
    return int(number)


def _number_in(text: str) -> float | None:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        return None


def _switch(name: str, value: Any) -> Any:
    """A text that says yes or no as what it says: as a text either would be true."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral | np.bool_) and value in (0, 1):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in _WORDS:
        raise UsageError(f"{name} must be true or false, but got {value!r}.")
    return _WORDS[word]


def _refuse_not_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, but got {value}.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_not_finite(f"{name} {key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_not_finite(name, item)
