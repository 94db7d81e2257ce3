"""MOLLMConfig: `transformers.TrainingArguments` with what unlearning adds."""

from __future__ import annotations

import functools
import inspect
import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mollm.errors import UsageError
from mollm.methods import METHODS, ForgetLoss, Method, find_method, unlearning_cross_entropy
from mollm.methods.method import OBJECTIVES
from mollm.models.four_bits import NF4
from mollm.models.precision import DTYPES, autocast
from mollm.optim.optimizer import MOLLMOptimizer
from mollm.training.reference_model import REFERENCES

_SIDES = ("left", "right")
_SHARDINGS = ("full_shard", "hybrid_shard")
_TELLING = (
    "method",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "freeze_embeddings",
    "seed",
)
_NOT_TOLD = (
    "output_dir",
    "disable_tqdm",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "hub_token",
    "report_to",
    "run_name",
    "use_cpu",
)
_PLAIN = (bool, int, float, str, list, dict)
_NOT_FOR_THIS = {
    "auto_find_batch_size": "choose per_device_train_batch_size, with `mollm plan`",
    "bf16_full_eval": "an evaluation computes as a step does",
    "deepspeed": "its ZeRO is not proven with MOLLMOptimizer; fsdp takes its place",
    "enable_jit_checkpoint": "choose save_steps",
    "fsdp_config": "fsdp alone says how a model is cut into parts",
    "fp16": "matrix products are in bfloat16 where the device computes in it natively",
    "fp16_full_eval": "an evaluation computes as a step does",
    "ignore_data_skip": "a run goes on with the rows that come next",
    "label_smoothing_factor": "the losses are fixed by the method",
    "neftune_noise_alpha": "the losses are fixed by the method",
    "optim": "name the base in optimizer_options",
    "push_to_hub": "upload the exported model, with `hf upload`",
    "save_only_model": "every checkpoint can be resumed from",
    "torch_compile": "the step is not compiled",
    "use_liger_kernel": "the losses of mollm take its place",
}


@dataclass
class MOLLMConfig(TrainingArguments):  # type: ignore[misc]
    """Settings of a MOLLMTrainer: those of `TrainingArguments`, with a few more and other defaults.

    A step sees `per_device_train_batch_size` x `gradient_accumulation_steps` rows to forget on each
    process, and as many to retain; epochs are counted in rows to forget. Matrix products are in
    bfloat16 where the device computes in it natively.

    `fsdp="full_shard"`, or True, cuts the model into parts over all processes, "hybrid_shard" over
    those of a node; without it every process holds a copy. See `mollm.distributed.processes`.
    Of a model given by name the first process alone reads the weights, for which `ddp_timeout`
    must leave time.

    Raises:
        UsageError: A value is out of range, or an option does not go with unlearning.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "of the first step"})
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "largest norm of the common direction; 0 does not clip, and saves memory"
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "steps between logs"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})

    fsdp: Any = field(
        default=None,
        metadata={"help": "full_shard or hybrid_shard: processes hold parts of the model"},
    )
    method: str = field(
        default="mollm", metadata={"help": "how to unlearn, one of mollm.methods.METHODS"}
    )
    preferences: list[float] | None = field(
        default=None,
        metadata={"help": "of forget, kl and retain, for methods that have any"},
    )
    uce_eps: float = field(
        default=1e-4,
        metadata={
            "help": "of the unlearning cross-entropy: less pushes harder on what is known by heart"
        },
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "the original: adapter, copy, cache or auto; see mollm.training.reference_model"
        },
    )
    max_length: int = field(default=1024, metadata={"help": "most tokens of a row"})
    padding_side: str = field(default="right", metadata={"help": "left or right"})
    dtype: str = field(
        default="float32", metadata={"help": "of the weights of a model given by name"}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "nf4: a model given by name is loaded in 4 bits, for an adapter (QLoRA)"},
    )
    freeze_embeddings: bool = field(
        default=True, metadata={"help": "leave token embeddings and head as they are"}
    )
    optimizer_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "of MOLLMOptimizer: base, metric, momentum, gradient_memory, ..."},
    )
    divergence: float = field(
        default=5.0,
        metadata={"help": "nats by which KL, or the rise of the retain loss, stops the run"},
    )

    def __post_init__(self) -> None:
        self.optimizer_options = {
            name: str(value).removeprefix("torch.") if name == "state_dtype" and value else value
            for name, value in self.optimizer_options.items()
        }
        self._refuse_other_options()
        self._refuse_launchers()
        self.sharding = _sharding(self.fsdp)
        # Accelerate, which transformers would hand it on to, is not to wrap the model.
        self.fsdp = None
        super().__post_init__()
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
        _one_of("method", self.method, METHODS)
        _one_of("reference", self.reference, REFERENCES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("padding_side", self.padding_side, _SIDES)
        if not 0 < self.uce_eps < 1:
            raise UsageError(f"uce_eps must be between 0 and 1, but got {self.uce_eps}.")
        self.quantization = self.quantization or None
        if self.quantization:
            _one_of("quantization", self.quantization, (NF4,))
            if self.sharding:
                raise UsageError(
                    f"quantization must be left out where processes hold parts of the model, but "
                    f"got {self.quantization} with {self.sharding}: give each a copy."
                )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        for name in ("learning_rate", "divergence"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a positive number, but got {value}.")
        epochs = self.num_train_epochs
        if self.max_steps <= 0 and not (math.isfinite(epochs) and epochs > 0):
            raise UsageError(
                "num_train_epochs must be a positive number where max_steps is not given, but got "
                f"{epochs}."
            )
        if self.save_strategy == SaveStrategy.BEST and self.eval_strategy == IntervalStrategy.NO:
            raise UsageError("eval_strategy must be given for the save_strategy best, but got no.")
        if self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
            raise UsageError(
                "lr_scheduler_type must be one that goes by the step, but got reduce_lr_on_plateau."
            )
        if self.bf16 and not autocast(self.device)._enabled:
            raise UsageError(
                f"bf16 must be left out where the device does not compute in it natively, but got "
                f"it on {self.device}."
            )
        self._try_optimizer()

    def _try_optimizer(self) -> None:
        """Says now what MOLLMOptimizer would say once the model is loaded."""
        options = self.for_optimizer()
        if callable(options.get("base")):  # its own options, and what it asks of parameters, wait
            known = inspect.signature(MOLLMOptimizer).parameters
            options = {name: options[name] for name in options if name in known} | {"base": "sgd"}
        try:
            optimizer = MOLLMOptimizer(
                [nn.Parameter(torch.zeros(1))], objectives=OBJECTIVES, **options
            )
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            asked = {"preferences": self.preferences, **self.optimizer_options}
            told = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)
            raise UsageError(
                f"optimizer_options must suit MOLLMOptimizer, but got {told}: {reason}."
            ) from error
        if self.max_grad_norm > 0 and not optimizer.can_aggregate:
            raise UsageError(
                f"max_grad_norm must be 0 with momentum='per-objective' in AdamW's metric, but got "
                f"{self.max_grad_norm}: leave it out, or add metric='euclidean' to "
                "optimizer_options."
            )

    def refuse_four_bits_without(self, adapter: Any | None) -> None:
        """Says that nothing but an adapter trains beside matrices in 4 bits.

        Raises:
            UsageError: There are to be such matrices, but no adapter.
        """
        if self.quantization and adapter is None:
            raise UsageError(
                f"quantization must go with an adapter, for nothing else trains in 4 bits, but got "
                f"{self.quantization} alone: give peft_config, or --lora."
            )

    def _refuse_launchers(self) -> None:
        for engine in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
                raise UsageError(
                    "accelerate must launch processes of type MULTI_GPU, but it was told to use "
                    f"{engine}: change its configuration, and choose fsdp in that of the run."
                )

    def _refuse_other_options(self) -> None:
        defaults = {
            f.name: f.default for f in fields(TrainingArguments) if f.default is not MISSING
        }
        for name, instead in _NOT_FOR_THIS.items():
            value = getattr(self, name, None)
            if name in defaults and value != defaults[name] and value:
                raise UsageError(
                    f"{name} must be left out of a MOLLMConfig, but got {value}: {instead}."
                )

    @property
    def chosen_method(self) -> Method:
        """The method by that name."""
        return find_method(self.method)

    @property
    def forget_loss(self) -> ForgetLoss:
        """That of the method, with `uce_eps` where it is the unlearning cross-entropy."""
        loss = self.chosen_method.forget_loss
        if loss is unlearning_cross_entropy:
            return functools.partial(unlearning_cross_entropy, eps=self.uce_eps)
        return loss

    @property
    def rows_per_step(self) -> int:
        """Rows to forget in a step of all processes; as many are to be retained."""
        mine = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return int(mine * self.world_size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, for loggers: a base that is a class goes by its name."""
        options = {
            name: value if isinstance(value, (*_PLAIN, tuple, type(None))) else _name_of(value)
            for name, value in self.optimizer_options.items()
        }
        return {**super().to_dict(), "optimizer_options": options}

    def told(self) -> dict[str, Any]:
        """What a reader of the model card wants to know: the most telling, and what was changed."""
        told = {name: getattr(self, name) for name in _TELLING}
        if self.world_size > 1:
            told |= {"processes": self.world_size, "fsdp": self.sharding or "off"}
        for f in fields(self):
            value = getattr(self, f.name)
            changed = value and isinstance(value, _PLAIN) and value != f.default
            if changed and f.name not in (*_NOT_TOLD, *told):
                told[f.name] = value
        return {name: getattr(value, "value", value) for name, value in told.items()}

    def for_optimizer(self) -> dict[str, Any]:
        """Keyword arguments for MOLLMOptimizer, but for parameters and objectives."""
        options = dict(self.optimizer_options)
        if options.get("state_dtype") in DTYPES:
            options["state_dtype"] = DTYPES[options["state_dtype"]]
        if options.get("base", "adamw") == "adamw":
            betas = (self.adam_beta1, self.adam_beta2)
            options = {"betas": betas, "eps": self.adam_epsilon, **options}
        if self.preferences is not None:
            options = {"preferences": self.preferences, **options}
        return {"lr": self.learning_rate, **self.chosen_method.optimizer_options(), **options}


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{value.__module__}.{name}"


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
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
