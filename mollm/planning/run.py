"""A run of the trainer as `plan` sees it: its settings, and whether it fits, before it loads."""

from __future__ import annotations

import logging
import math
import shlex
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from mollm.errors import UsageError
from mollm.planning.memory import plan
from mollm.planning.settings import DEVICES, GIB, flag_of
from mollm.planning.shapes import shape_of

if TYPE_CHECKING:
    from mollm.planning.settings import PlanSettings
    from mollm.training.config import MOLLMConfig


logger = logging.getLogger(__name__)

_LASTING = ("parameters", "reference model", "optimizer state", "running means")


def check_memory(model: str, args: MOLLMConfig, adapter: Any | None) -> None:
    """Compares what `mollm plan` predicts with the device's memory, before weights are loaded.

    A model that is not planned passes, and so do a device whose memory is not known and several
    processes, of which each may hold a part.

    Raises:
        UsageError: Even what is there throughout does not fit.
    """
    from mollm.models import loading
    from mollm.system import machine

    config, label = loading.load_config(model)
    memory = machine.available_memory_gb(args.device) * machine.GB
    if args.device.type not in DEVICES or math.isinf(memory) or args.world_size > 1:
        return
    settings = plan_settings(args, adapter)
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = known or settings.sequence_length
    settings = replace(settings, sequence_length=min(context, settings.sequence_length))
    try:
        planned = plan(shape_of(config, label), settings)
    except UsageError:  # of another family
        return
    way_out = f"see what would fit with `{plan_line(model, settings)}`."
    there = f"{memory / GIB:.2f} GiB are available on {settings.device}"
    lasting = sum(planned.component(name) for name in _LASTING)
    if lasting > memory:
        raise UsageError(
            f"the model {label} must fit into memory, but with its reference and the optimizer's "
            f"state it takes {lasting / GIB:.2f} GiB, and {there}: {way_out}"
        )
    if not planned.fits(memory):
        logger.warning(
            f"A step with rows of {settings.sequence_length} tokens, the longest that max_length "
            f"allows, would take {planned.peak.total / GIB:.2f} GiB, but only {there}: "
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
    from mollm.planning.settings import PER_OBJECTIVE, PlanSettings

    options = args.optimizer_options
    momentum = options.get("momentum")
    original = "copy" if adapter is None else "adapter"
    return PlanSettings(
        batch_size=args.per_device_train_batch_size,
        sequence_length=args.max_length,
        accumulation=args.gradient_accumulation_steps,
        dtype=args.dtype,
        compute_dtype=_compute_dtype(args),
        state_dtype=options.get("state_dtype"),
        adam_beta2=float(args.for_optimizer().get("betas", (0, args.adam_beta2))[1]),
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


def _compute_dtype(args: MOLLMConfig) -> str:
    from mollm.system.precision import compute_dtype, computing_in

    with computing_in(args.compute_dtype):
        return compute_dtype(args.device).name


def plan_line(model: str, settings: PlanSettings) -> str:
    """The command that plans a run."""
    words = ["mollm", "plan", "--model", model]
    for option in fields(settings):
        value = getattr(settings, option.name)
        if value is not None and value is not False:
            words.append(flag_of(option.name))
            words += [] if value is True else [str(value)]
    return shlex.join(words)
