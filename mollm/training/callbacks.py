"""Callbacks that a MOLLMTrainer adds to those of transformers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from mollm.distributed import processes
from mollm.methods.method import OBJECTIVES
from mollm.training.config import MOLLMConfig
from mollm.training.history import StepRecord
from mollm_ops import Status

_SKIPS = 10

logger = logging.getLogger(__name__)


class DivergenceStop(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose model falls apart.

    It stops where a loss is not finite, where KL exceeds `divergence` nats, where the retain
    loss has risen by as much since the first step, or where ten steps in a row had to be skipped
    because a gradient was not finite.

    Args:
        history: The records of all steps, which the trainer adds to.
    """

    def __init__(self, history: Sequence[StepRecord]) -> None:
        self._history = history
        self.reason: str | None = None
        """Why the run was stopped, in a sentence."""

    def on_train_begin(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reason = None

    def on_step_end(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reason = self._found(args.divergence)
        if self.reason is not None:
            if processes.rank() == 0:
                logger.warning(self.reason)
            control.should_training_stop = True

    def _found(self, bound: float) -> str | None:
        first, last = self._history[0].losses, self._history[-1].losses
        step = len(self._history)
        out = "lower the learning rate, or give retaining a larger preference."
        for name in OBJECTIVES:
            if not math.isfinite(last[name]):
                return (
                    f"the {name} loss must be finite, but in step {step} it is {last[name]}: {out}"
                )
        for name, grown in (("kl", last["kl"]), ("retain", last["retain"] - first["retain"])):
            if grown > bound:
                return (
                    f"the {name} loss must not grow by more than {bound:g} nats, but by step "
                    f"{step} it has grown by {grown:.1f}: {out}"
                )
        recent = self._history[-_SKIPS:]
        if len(recent) == _SKIPS and all(r.status == Status.NON_FINITE.name for r in recent):
            return (
                f"gradients must be finite, but up to step {step} {_SKIPS} steps were skipped in a "
                f"row: {out}"
            )
        return None


class LossBar(ProgressCallback):  # type: ignore[misc]
    """The progress bar of transformers, with the three losses in it in place of lines above it."""

    def on_log(
        self,
        args: MOLLMConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        shown = {name: logs[f"{name}_loss"] for name in OBJECTIVES if f"{name}_loss" in logs}
        if shown:
            self.training_bar.set_postfix({name: f"{loss:.3f}" for name, loss in shown.items()})
