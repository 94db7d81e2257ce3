"""Whether a run fits into this machine's memory, before it starts."""

from __future__ import annotations

import logging
import math
import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from mollm.errors import UsageError
from mollm.planning.memory import plan
from mollm.planning.settings import flag_of
from mollm.planning.shapes import shape_of
from mollm.system import machine
from mollm.system.folders import public_name
from mollm.system.units import GIB

if TYPE_CHECKING:
    from mollm.planning.settings import PlanSettings


logger = logging.getLogger(__name__)

_LASTING = ("parameters", "reference model", "optimizer state", "running means")


def check_memory(
    model: str, config: Any, settings: PlanSettings, *, held: int = 0, step: bool = True
) -> float | None:
    """Compares what `mollm plan` predicts with the memory that this machine has.

    A model that is not planned passes, and so does a device whose memory is not known.

    Args:
        model: Its name, for messages.
        config: Its configuration.
        settings: How it is to be trained.
        held: Bytes of it that are in memory already.
        step: Whether to warn where a step may not fit.

    Returns:
        The peak in bytes that is predicted, None where none is.

    Raises:
        UsageError: Even what is there throughout does not fit.
    """
    memory = machine.available_memory(torch.device(settings.device)) + held
    if math.isinf(memory):
        return None
    label = public_name(model)
    try:
        planned = plan(shape_of(config, label), settings)
    except UsageError:  # of another family
        return None
    way_out = f"see what would fit with `{plan_line(model, settings)}`."
    there = f"{memory / GIB:.2f} GiB are available on {settings.device}"
    lasting = sum(planned.component(name) for name in _LASTING)
    if lasting > memory:
        raise UsageError(
            f"the model {label} must fit into memory, but with its reference and the optimizer's "
            f"state it takes {lasting / GIB:.2f} GiB, and {there}: {way_out}"
        )
    if step and not planned.fits(memory):
        logger.warning(
            f"A step with rows of {settings.sequence_length} tokens, the longest of the data, "
            f"would take {planned.peak.total / GIB:.2f} GiB, but only {there}: {way_out}"
        )
    return planned.peak.total


def plan_line(model: str, settings: PlanSettings) -> str:
    """The command that plans a run."""
    words = ["mollm", "plan", "--model", model]
    for option in fields(settings):
        value = getattr(settings, option.name)
        if "help" in option.metadata and value not in (None, ()) and value is not False:
            words.append(flag_of(option.name))
            values = value if isinstance(value, tuple) else (value,)
            words += [] if value is True else map(str, values)
    return shlex.join(words)
