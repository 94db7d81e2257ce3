"""When a run has forgotten enough, or would keep too little."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from mollm.data.chat import Tokens
from mollm.distributed import processes
from mollm.errors import UsageError, did_you_mean
from mollm.evaluation.records import read_records
from mollm.evaluation.scores import score_rows
from mollm.system.parsing import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mollm.training.config import MOLLMConfig

MOST_ROWS = 64
"""Of each set, how many are looked at."""
_EVERY = 10
_AT_MOST = ("forget_probability", "forget_accuracy")
_AT_LEAST = ("retain_probability",)
_STEPS = "steps"
_PREFIX = "stop_"

Measure = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class StopRule:
    """What `stop_when` of a MOLLMConfig says.

    Raises:
        UsageError: It names something else, or a value is out of range.
    """

    at_most: Mapping[str, float]
    """The run has reached its target where all of these are at or below their value."""
    at_least: Mapping[str, float]
    """It stops too where one of these falls below its value."""
    steps: int
    """Between looks."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> StopRule:
        """Reads the setting; a text for forget_probability is where a retain-only model's
        examples.jsonl is, and stands for its mean."""
        known = (*_AT_MOST, *_AT_LEAST, _STEPS)
        for name in told:
            if name not in known:
                raise UsageError(
                    f"stop_when must hold some of {', '.join(known)}, but got {name!r}"
                    f"{did_you_mean(str(name), known)}"
                )
        steps = told.get(_STEPS, _EVERY)
        steps = int(steps) if isinstance(steps, float) and steps.is_integer() else steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise UsageError(f"stop_when: steps must be a whole number from 1, but got {steps!r}.")
        values = {name: _value(name, told[name]) for name in told if name != _STEPS}
        if not values:
            raise UsageError(f"stop_when must hold one of {', '.join(known[:-1])}, but has none.")
        return cls(
            {n: v for n, v in values.items() if n in _AT_MOST},
            {n: v for n, v in values.items() if n in _AT_LEAST},
            steps,
        )


class StopWhen(TrainerCallback):  # type: ignore[misc]
    """Ends a run that has reached its target, or keeps less than it must; see `StopRule`.

    What it finds stands in `log_history`, as stop_forget_probability and the like, and so in
    checkpoints: a resumed run knows the best that it reached before.

    Args:
        rule: When to stop.
        measure: The figures of the model as it is, on the first process.
    """

    def __init__(self, rule: StopRule, measure: Measure) -> None:
        self.rule = rule
        self._measure = measure
        self.told: str | None = None
        """How the run ended with regard to the rule, in a sentence."""

    def on_train_begin(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.told = None

    def on_step_end(
        self, args: MOLLMConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step = state.global_step
        if processes.rank() or (step % self.rule.steps and step < state.max_steps):
            return
        try:
            found = self._measure()
        except UsageError as error:  # its outputs are not finite: the losses will say so
            self.told = f"stopped after step {step}: {error}"
            control.should_training_stop = True
            return
        state.log_history.append({f"{_PREFIX}{n}": v for n, v in found.items()} | {"step": step})
        low = [n for n, bound in self.rule.at_least.items() if not found[n] >= bound]
        reached = self.rule.at_most and all(found[n] <= v for n, v in self.rule.at_most.items())
        if low:
            name = low[0]
            self.told = (
                f"stopped after step {step}: {name} is {found[name]:.3g}, less than "
                f"{self.rule.at_least[name]:g}."
            )
        elif reached:
            self.told = (
                f"stopped after step {step}, for the target is reached: {self._told(found)}."
            )
        if self.told is not None:
            control.should_training_stop = True
        elif step >= state.max_steps and self.rule.at_most:
            self.told = self._missed(state)

    def _told(self, found: Mapping[str, float]) -> str:
        targets = self.rule.at_most.items()
        return ", ".join(f"{n} is {found[n]:.3g} (at most {v:.3g})" for n, v in targets)

    def _missed(self, state: TrainerState) -> str:
        """The best of what was reached: where the farthest from its target is nearest."""
        looks = [log for log in state.log_history if _PREFIX + next(iter(self.rule.at_most)) in log]

        def distance(log: Mapping[str, float]) -> float:
            return max(log[_PREFIX + n] - v for n, v in self.rule.at_most.items())

        best = min(looks, key=distance)
        found = {n: best[_PREFIX + n] for n in self.rule.at_most}
        return (
            f"the target was not reached in {state.max_steps} steps; the nearest was after step "
            f"{best['step']}: {self._told(found)}."
        )


def measured(
    model: PreTrainedModel, rows: Mapping[str, Sequence[Tokens]], pad_id: int, batch_size: int
) -> dict[str, float]:
    """Mean likelihood exp(-L) of the answers of each set, and the share of their tokens that are
    the likeliest, both means over rows.

    Args:
        model: The model.
        rows: Of each role.
        pad_id: The id that fills a batch.
        batch_size: Rows that go together.
    """
    found = {}
    for role, some in rows.items():
        scores = score_rows(model, some, pad_id=pad_id, batch_size=batch_size)
        found[f"{role}_probability"] = sum(math.exp(-s.mean_nll) for s in scores) / len(scores)
        found[f"{role}_accuracy"] = sum(float(s.hits.mean()) for s in scores) / len(scores)
    return found


def _value(name: str, value: Any) -> float:
    if isinstance(value, str) and name == "forget_probability":
        scores = [
            r.scores["probability"] for r in read_records(user_path(value)) if r.group == "forget"
        ]
        if not scores:
            raise UsageError(
                f"stop_when: {value} must hold records of a forget set, but it holds none."
            )
        return sum(scores) / len(scores)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"stop_when: {name} must be from 0 to 1, but got {value!r}.")
    return float(value)
