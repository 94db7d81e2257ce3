"""Callbacks that a MOLLMTrainer adds to those of transformers."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from mollm.distributed import processes
from mollm.models.adapters import named
from mollm.training.config import MOLLMConfig
from mollm.training.history import StepRecord, skipped_in

_LINES = 20
_SKIPS = 10
_MOST_SKIPPED = 0.5
_WAY_OUT = "lower the learning rate, or give retaining a larger preference."

logger = logging.getLogger(__name__)


class DivergenceStop(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose model falls apart, and says at the end whether it is one to keep.

    It stops where a loss is not finite, in a step or an evaluation, where KL exceeds
    `max_loss_rise` nats, where a retain loss has risen by as much since the first step, or where
    ten steps in a row had to be skipped because a gradient was not finite. A run that ends fails
    all the same where that holds of its last step, where half of its steps or more were skipped,
    where all were that it made since it was resumed, and where weights are not finite.

    Args:
        history: The records of all steps, which the trainer adds to.
        retained: The objectives that are a loss on what to keep.
    """

    def __init__(self, history: Sequence[StepRecord], retained: Sequence[str]) -> None:
        self._history = history
        self._retained = retained
        self._runs = False
        self.first = 0
        """The steps that were made before this start of the run."""
        self.reason: str | None = None
        """Why the run is no success, in a sentence."""

    def on_train_begin(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reason = None
        self._runs = True

    def on_train_end(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._runs = False

    def on_step_end(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        last = self._history[-1].losses
        reason = self._found(last, len(self._history), args.max_loss_rise) or self._skips_in_a_row()
        self._stop(reason, control)

    def on_evaluate(
        self,
        args: MOLLMConfig,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not self._runs:
            return
        for name, value in (metrics or {}).items():
            if name.endswith("_loss") and not math.isfinite(value):
                step = len(self._history)
                reason = f"{name} must be finite, but after step {step} it is {value}: {_WAY_OUT}"
                self._stop(reason, control)
                return

    def at_the_end(
        self, losses: dict[str, float] | None, broken: Sequence[str], bound: float
    ) -> None:
        """Looks at what the last step has left.

        Args:
            losses: After the last step, if there was one.
            broken: Names of the weights that are not finite.
            bound: `max_loss_rise` of the settings.
        """
        mine = self._history[self.first :]
        skipped, made = skipped_in(self._history), len(self._history)
        if mine and skipped_in(mine) == len(mine):
            self._stop(
                f"gradients must be finite, but all {len(mine)} steps were skipped: {_WAY_OUT}"
            )
        elif made and skipped >= _MOST_SKIPPED * made:
            self._stop(
                f"gradients must be finite, but {skipped} of {made} steps were skipped: {_WAY_OUT}"
            )
        elif broken:
            self.refuse_weights(broken)
        elif losses is not None:
            self._stop(self._found(losses, len(self._history) + 1, bound))

    def refuse_weights(self, names: Sequence[str]) -> None:
        """Weights of these names are not finite."""
        step = len(self._history)
        self._stop(
            f"weights must be finite, but after step {step} {named(names)} are not: {_WAY_OUT}"
        )

    def _stop(self, reason: str | None, control: TrainerControl | None = None) -> None:
        if reason is None:
            return
        self.reason = reason
        if processes.rank() == 0:
            logger.warning(reason)
        if control is not None:
            control.should_training_stop = True

    def _found(self, losses: dict[str, float], step: int, bound: float) -> str | None:
        """What is wrong with the losses before a step, from 1."""
        first = self._history[0].losses
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return (
                    f"the {name} loss must be finite, but in step {step} it is {loss}: {_WAY_OUT}"
                )
        rises = {"kl": losses["kl"]}
        rises |= {name: losses[name] - first[name] for name in self._retained}
        for name, risen in rises.items():
            if risen > bound:
                return (
                    f"the {name} loss must not grow by more than {bound:g} nats, but by step "
                    f"{step} it has grown by {risen:.1f}: {_WAY_OUT}"
                )
        return None

    def _skips_in_a_row(self) -> str | None:
        recent = self._history[-_SKIPS:]
        if len(recent) == skipped_in(recent) == _SKIPS:
            return (
                f"gradients must be finite, but up to step {len(self._history)} {_SKIPS} steps "
                f"were skipped in a row: {_WAY_OUT}"
            )
        return None


class LossBar(ProgressCallback):  # type: ignore[misc]
    """The progress bar of transformers, with the losses in it in place of lines above it."""

    def __init__(self, objectives: Sequence[str]) -> None:
        super().__init__()
        self._objectives = objectives

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
        shown = {name: logs[f"{name}_loss"] for name in self._objectives if f"{name}_loss" in logs}
        if shown:
            self.training_bar.set_postfix({name: f"{loss:.3f}" for name, loss in shown.items()})


class LossLines(TrainerCallback):  # type: ignore[misc]
    """In place of a bar where there is no terminal: a line every twentieth of a run.

    Args:
        history: The records of all steps, which the trainer adds to.
    """

    def __init__(self, history: Sequence[StepRecord]) -> None:
        self._history = history
        self._started, self._first = 0.0, 0

    def on_train_begin(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started, self._first = time.monotonic(), state.global_step

    def on_step_end(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, steps = state.global_step, state.max_steps
        part = max(1, math.ceil(steps / _LINES))
        if not state.is_world_process_zero or (step % part and step != steps):
            return
        losses = ", ".join(f"{n} {loss:.3f}" for n, loss in self._history[-1].losses.items())
        gone = time.monotonic() - self._started
        left = gone * (steps - step) / (step - self._first)
        print(f"step {step} of {steps}, {losses}, {left:.0f} s left", file=sys.stderr, flush=True)
