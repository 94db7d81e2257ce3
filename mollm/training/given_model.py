"""The model that a MOLLMTrainer is given: by name, as a module, with an adapter, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from mollm.distributed import processes
from mollm.errors import UsageError
from mollm.models import forward, four_bits, loading, trainable
from mollm.models.adapters import adapted, given, uncompiled
from mollm.system.folders import check_space
from mollm.system.precision import DTYPES
from mollm.training.config import MOLLMConfig

_NOT_COMPILED = "The model was given compiled; its step is not."
_ITS_ADAPTER = (
    "The model was given with an adapter, which trains; the original is the model with that "
    "adapter as it was given."
)


def taken(model: Any, peft_config: Any | None, args: MOLLMConfig) -> tuple[Any, Any, list[str]]:
    """The model as it is used, its wrapper where it was given with an adapter, and notes.

    Raises:
        UsageError: It is no model, or has an adapter in a way that cannot be followed.
    """
    if isinstance(model, str | Path):
        return str(model), None, []
    if not isinstance(model, nn.Module):
        raise UsageError(
            "model must be a name, a folder or a causal language model of transformers, but got "
            f"{type(model).__name__}."
        )
    bare = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if bare is not None:
        raise UsageError(
            f"a model must have its weights, but {bare} of this one is on the meta device: load "
            "them, or give the model's name."
        )
    model, compiled = uncompiled(model)
    notes = [_NOT_COMPILED] if compiled else []
    if hasattr(model, "get_base_model"):
        if peft_config is not None:
            raise UsageError(
                "peft_config must be left out for a model that has an adapter: its adapter trains; "
                "or merge that first, with `merge_and_unload` of peft."
            )
        if args.sharding is not None:
            raise UsageError(
                f"fsdp must be left out for a PeftModel, but got {args.sharding}: give the model "
                "and peft_config, or let each process hold a copy."
            )
        return given(model).get_base_model(), model, [*notes, _ITS_ADAPTER]
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            "model must be a name, a folder or a causal language model of transformers, but got "
            f"{type(model).__name__}."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            "a model must not hold an adapter of its own: give it as a peft.PeftModel, or merge "
            "the adapter."
        )
    return model, None, notes


def check_without_weights(source: loading.Source, args: MOLLMConfig, config: Any | None) -> None:
    """What a model on the meta device tells: whether adapter, names and checkpoints fit.

    Raises:
        UsageError: One of them does not.
    """
    of_weights = config is not None or args.trainable_parameters
    if not of_weights and args.save_strategy == SaveStrategy.NO:
        return
    model = loading.load_without_weights(source, DTYPES[args.dtype])
    if config is not None:
        adapted(model, config)
    else:
        freeze(model, args)
    if args.save_strategy != SaveStrategy.NO and processes.rank() == 0:
        size = DTYPES[args.dtype].itemsize
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        written = trains if config is not None else sum(p.numel() for p in model.parameters())
        check_space(Path(args.output_dir), (written + trains) * size, "the weights of a checkpoint")


def freeze(model: PreTrainedModel, args: MOLLMConfig) -> None:
    """Takes out of training what the settings leave as it is.

    Raises:
        UsageError: They name parameters that the model has not, or let embeddings train and then
            do not.
    """
    if args.freeze_embeddings:
        forward.freeze_embeddings(model)
    if not args.trainable_parameters:
        return
    trainable.train_only(model, args.trainable_parameters)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not (args.freeze_embeddings or any(p.requires_grad for e in ends for p in e.parameters())):
        raise UsageError(
            "freeze_embeddings must be left out where trainable_parameters names neither "
            f"embeddings nor head, but got False with {args.trainable_parameters}: leave it out, "
            "or name them too."
        )


def loaded(
    source: loading.Source, config: Any, args: MOLLMConfig, device: torch.device, tokenizer: Any
) -> PreTrainedModel:
    """A model by name, on the first process alone with its weights where it will be cut.

    Raises:
        UsageError: It cannot be loaded, or not be cut into parts.
    """
    if args.sharding is not None and getattr(config, "quantization_config", None):
        raise UsageError(
            f"fsdp must be left out for a model whose weights are quantized, but got "
            f"{args.sharding} for {source.label}: let each process hold a copy."
        )
    dtype = DTYPES[args.dtype]
    if args.sharding is not None and processes.rank() > 0:
        return loading.load_without_weights(source, dtype)
    return loading.load(source, device, dtype, args.quantization, tokenizer)[0]


def refuse_four_bits(model: PreTrainedModel, args: MOLLMConfig) -> None:
    """Says what a model given as a module cannot have.

    Raises:
        UsageError: It is to be quantized, or is and is to be cut into parts.
    """
    if args.quantization:
        raise UsageError(
            f"quantization must be left out for a model that is given as a module, but got "
            f"{args.quantization}: load that in 4 bits, or give its name."
        )
    if args.sharding is not None and any(map(four_bits.in_four_bits, model.parameters())):
        raise UsageError(
            f"fsdp must be left out for a model in 4 bits, but got {args.sharding}: let each "
            "process hold a copy."
        )


def refuse_kept_parts(reference: Any, args: MOLLMConfig) -> None:
    """Says that copies of what an adapter leaves trained cannot be cut into parts.

    Raises:
        UsageError: The reference keeps such copies, and processes hold parts of the model.
    """
    original = getattr(reference, "original", None)
    if args.sharding is not None and original is not None and original.keeps_copies:
        raise UsageError(
            f"fsdp must be left out where an adapter trains biases too, but got {args.sharding}: "
            "set bias to none, or let each process hold a copy."
        )
