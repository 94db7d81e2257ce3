"""What becomes of every setting: whether a run takes it, and what a resumed run may change.

Each field of MOLLMConfig, those of `transformers.TrainingArguments` among them, is in one of three
tables. A test holds that none is missing, so that a new field is never ignored in silence.

    UNSUPPORTED   refused unless it is left at its default, with the way out
    FIXED         a run that resumes must have it as it was
    FREE          a run that resumes may change it, and the change takes effect from there on

A field that is in no table, of a later release of transformers, is taken for FIXED.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from mollm.optim.optimizer import MOLLMOptimizer

_NO_LOADER = "rows are held in memory, and no worker loads them"
_NO_HUB = "call push_to_hub of the trainer once it has trained"
_NO_DDP = "processes add up gradients without DistributedDataParallel"
_NO_METRICS = "an evaluation gives the losses, and `mollm evaluate` metrics"
_NO_COMPILE = "the step is not compiled"
_FIXED_LOSSES = "the losses are fixed by the method"
_NAME_THE_BASE = "name the base in optimizer_options"
_NO_SCRIPT = "call train() or evaluate() of the trainer"

UNSUPPORTED: Mapping[str, str] = {
    "accelerator_config": "the step has one loop of its own",
    "auto_find_batch_size": "choose per_device_train_batch_size, with `mollm plan`",
    "average_tokens_across_devices": "losses are means over the tokens of all processes",
    "batch_eval_metrics": _NO_METRICS,
    "bf16_full_eval": "an evaluation computes as a step does",
    "dataloader_drop_last": "no row is dropped",
    "dataloader_in_order": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "dataloader_num_workers": _NO_LOADER,
    "dataloader_persistent_workers": _NO_LOADER,
    "dataloader_pin_memory": _NO_LOADER,
    "dataloader_prefetch_factor": _NO_LOADER,
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_bucket_cap_mb": _NO_DDP,
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "debug": "a step that is not finite is skipped and counted",
    "deepspeed": "its ZeRO is not proven with MOLLMOptimizer; fsdp takes its place",
    "do_eval": _NO_SCRIPT,
    "do_predict": _NO_SCRIPT,
    "do_train": _NO_SCRIPT,
    "enable_jit_checkpoint": "choose save_steps",
    "eval_accumulation_steps": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_on_start": "call evaluate() before train()",
    "eval_use_gather_object": _NO_METRICS,
    "fp16": "matrix products are in bfloat16 where the device computes in it natively",
    "fp16_backend": "matrix products are in bfloat16 where the device computes in it natively",
    "fp16_full_eval": "an evaluation computes as a step does",
    "fsdp_config": "fsdp alone says how a model is cut into parts",
    "group_by_length": "the order of rows is decided by the seed",
    "half_precision_backend": "matrix products are in bfloat16 where the device computes in it",
    "hub_always_push": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_revision": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_token": _NO_HUB,
    "ignore_data_skip": "a run resumes with the rows that come next",
    "include_for_metrics": _NO_METRICS,
    "include_num_input_tokens_seen": "logs hold tokens_per_second",
    "label_names": "data are read by prompt and answer fields",
    "label_smoothing_factor": _FIXED_LOSSES,
    "length_column_name": "data are read by prompt and answer fields",
    "liger_kernel_config": "the losses of mollm take its place",
    "log_on_each_node": "the first process logs",
    "logging_nan_inf_filter": "logs hold what was found",
    "neftune_noise_alpha": _FIXED_LOSSES,
    "optim": _NAME_THE_BASE,
    "optim_args": "give them in optimizer_options",
    "optim_target_modules": _NAME_THE_BASE,
    "parallelism_config": "choose fsdp",
    "prediction_loss_only": _NO_METRICS,
    "push_to_hub": _NO_HUB,
    "remove_unused_columns": "data are read by prompt and answer fields",
    "restore_callback_states_from_checkpoint": "callbacks begin anew",
    "resume_from_checkpoint": "give it to train()",
    "save_on_each_node": "the first process saves, to a folder that all see",
    "save_only_model": "every checkpoint can be resumed from",
    "save_safetensors": "weights are always written as safetensors",
    "skip_memory_metrics": "see the memory with `mollm plan`",
    "torch_compile": _NO_COMPILE,
    "torch_compile_backend": _NO_COMPILE,
    "torch_compile_mode": _NO_COMPILE,
    "torch_empty_cache_steps": "memory is planned, with `mollm plan`",
    "torchdynamo": _NO_COMPILE,
    "train_sampling_strategy": "the order of rows is decided by the seed",
    "use_cache": "no step generates",
    "use_liger_kernel": "the losses of mollm take its place",
}

FIXED = frozenset(
    {
        "chat_template_kwargs",
        "data_seed",
        "dtype",
        "freeze_embeddings",
        "method",
        "method_options",
        "prompt_format",
        "quantization",
        "seed",
        "system_prompt",
        "train_on_turns",
        "trainable_parameters",
    }
)

FREE = frozenset(
    {
        # The step, from the next one on. A checkpoint also holds what decides the rows of a step,
        # see `rows_per_step`, and a hash of the data as tokens: these are fixed whatever changes.
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_loss_rise",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "long_rows",
        "max_length",
        "max_steps",
        "num_train_epochs",
        "padding_side",
        "per_device_retain_batch_size",
        "per_device_train_batch_size",
        "preferences",
        "reference",
        "relearn_lr",
        "relearn_steps",
        "uce_eps",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "optimizer_options",  # by name, see below
        # How it is computed.
        "compute_dtype",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "bf16",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "full_determinism",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "local_rank",
        "tf32",
        "use_cpu",
        # What is told and kept of it.
        "disable_tqdm",
        "eval_delay",
        "eval_steps",
        "eval_strategy",
        "greater_is_better",
        "load_best_model_at_end",
        "log_level",
        "log_level_replica",
        "logging_dir",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "metric_for_best_model",
        "output_dir",
        "per_device_eval_batch_size",
        "project",
        "report_to",
        "run_name",
        "sample_replies",
        "stop_when",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)

FREE_OPTIMIZER_OPTIONS = frozenset(
    {
        "betas",
        "direction",
        "eps",
        "gradient_memory",
        "gram",
        "length",
        "lr",
        "normalize",
        "on_nonfinite",
        "preferences",
        "stochastic_rounding",
        "track_conflicts",
        "weight_decay",
    }
)
"""Of `optimizer_options`: what a resumed run may change; all others decide what the state is."""


def fixed_settings(settings: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a resumed run must have as they were, as plain values.

    Args:
        settings: All of a run, by name.
        optimizer: What MOLLMOptimizer is made with, by name.
    """
    fixed = {n: v for n, v in settings.items() if n not in FREE and n not in UNSUPPORTED}
    defaults = inspect.signature(MOLLMOptimizer).parameters
    fixed |= {
        f"optimizer {name}": value
        for name, value in optimizer.items()
        if name not in FREE_OPTIMIZER_OPTIONS
        and not (name in defaults and value == defaults[name].default)
    }
    return {name: plain(value) for name, value in fixed.items()}


def free_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a resumed run may change, as plain values.

    Args:
        settings: All of a run, by name.
    """
    options = settings.get("optimizer_options") or {}
    free = {n: v for n, v in settings.items() if n in FREE and n != "optimizer_options"}
    free |= {
        f"optimizer_options {name}": value
        for name, value in options.items()
        if name in FREE_OPTIMIZER_OPTIONS
    }
    return {name: plain(value) for name, value in free.items()}


def plain(value: Any) -> Any:
    """A setting as JSON has it: dtypes, classes and enumerations by name."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, functools.partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    return getattr(value, "__qualname__", None) or type(value).__qualname__
