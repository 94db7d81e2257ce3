"""A run of MOLLMTrainer as `mollm plan` sees it, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.methods.method import OBJECTIVES
from mollm.models.four_bits import NF4, in_four_bits
from mollm.optim.constants import PER_OBJECTIVE
from mollm.planning.run import check_memory
from mollm.planning.settings import PlanSettings
from mollm.system.precision import compute_dtype, computing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.training.config import MOLLMConfig


def check_run(
    model: str | PreTrainedModel,
    config: Any,
    args: MOLLMConfig,
    adapter: Any | None,
    *,
    longest: int,
    objectives: Sequence[str],
    step: bool = True,
) -> float | None:
    """Compares a run with the memory of its device before it takes any; see `check_memory`.

    Several processes pass, of which each may hold a part, and so does what `mollm plan` does not
    know, such as a base optimizer of another kind.

    Args:
        model: Its name, or the model, which is in memory already.
        config: Its configuration.
        args: The settings of the run.
        adapter: The LoraConfig that it trains, or None.
        longest: Tokens of the longest row.
        objectives: Their names.
        step: Whether to warn where a step may not fit.

    Returns:
        The peak in bytes that is predicted, None where none is.

    Raises:
        UsageError: Even what is there throughout does not fit.
    """
    dtype, quantization, held = args.dtype, args.quantization, 0
    if not isinstance(model, str):
        dtype = str(model.dtype).removeprefix("torch.")
        weights = list(model.parameters())
        quantization = NF4 if any(map(in_four_bits, weights)) else None
        if model.device.type == args.device.type:
            held = sum(p.numel() * p.element_size() for p in weights)
        model = model.name_or_path or type(model).__name__
    if args.world_size > 1:
        return None
    try:
        settings = plan_settings(
            args,
            adapter,
            longest=longest,
            objectives=objectives,
            dtype=dtype,
            quantization=quantization,
        )
    except UsageError:
        return None
    return check_memory(model, config, settings, held=held, step=step)


def plan_settings(
    args: MOLLMConfig,
    adapter: Any | None,
    *,
    longest: int,
    objectives: Sequence[str] = OBJECTIVES,
    dtype: str | None = None,
    quantization: str | None = None,
) -> PlanSettings:
    """A run as `mollm plan` sees it.

    Args:
        args: Its settings.
        adapter: The LoraConfig that it trains, or None.
        longest: Tokens of the longest row.
        objectives: Their names.
        dtype: That of the weights; None for that of the settings.
        quantization: "nf4" where they are in 4 bits.

    Raises:
        UsageError: A setting is one that is not planned.
    """
    options, made = args.optimizer_options, args.for_optimizer(objectives)
    momentum = options.get("momentum")
    original = "copy" if adapter is None else "adapter"
    with computing_in(args.compute_dtype):
        computes = compute_dtype(args.device).name
    rows = args.per_device_train_batch_size
    pairs = 2 if args.chosen_method.alternatives else 1
    return PlanSettings(
        batch_size=pairs * rows,
        retain_batch_size=args.per_device_retain_batch_size or (rows if pairs > 1 else None),
        objectives=len(objectives),
        relearn_steps=args.relearn_steps,
        sequence_length=longest,
        accumulation=args.gradient_accumulation_steps,
        dtype=dtype or args.dtype,
        compute_dtype=computes,
        state_dtype=options.get("state_dtype"),
        adam_beta2=float(made.get("betas", (0, args.adam_beta2))[1]),
        gradient_memory=options.get("gradient_memory", "as-produced"),
        gram=options.get("gram", "model"),
        momentum=momentum if momentum == PER_OBJECTIVE else None,
        metric=made["metric"],
        reference=original if args.reference == "auto" else args.reference,
        lora_rank=0 if adapter is None else adapter.r,
        quantization=quantization,
        gradient_checkpointing=args.gradient_checkpointing,
        freeze_embeddings=args.freeze_embeddings,
        trainable_parameters=tuple(args.trainable_parameters or ()),
        optimizer=made.get("base", "adamw"),
        device=args.device.type,
    )
