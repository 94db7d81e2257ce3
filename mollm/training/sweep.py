"""A few short runs at several learning rates, and which of them to take.

Each run trains a model of its own from the original and is looked at four times, on rows that it
does not train on where there are such. With p the mean likelihood of the answers of a set,

    forgotten = 1 - min(1, p_forget / p_forget(original))
    kept      = min(1, p_retain / p_retain(original))

and a point is as good as the harmonic mean of the two: one without the other is worth nothing.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mollm.data.records import ROLES
from mollm.data.sets import named_sets, records_of, role_of
from mollm.errors import UsageError
from mollm.training.config import MOLLMConfig
from mollm.training.trainer import MOLLMTrainer

if TYPE_CHECKING:
    from mollm.data.records import Record, Role

_LOOKS = 4
_FACTOR = 4.0
_HELD_OUT = 0.2
_ENOUGH = 0.5
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 2, 32
_LARGEST = 0.1
"""No rate above this is tried."""
_WORN = 0.5
"""Below this share of what was kept, larger rates are not tried."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """What a run had forgotten and kept after some of its steps."""

    learning_rate: float
    steps: int
    """Of the whole run."""
    step: int
    forgotten: float
    kept: float

    @property
    def score(self) -> float:
        """Harmonic mean of forgotten and kept."""
        total = self.forgotten + self.kept
        return 2 * self.forgotten * self.kept / total if total > 0 else 0.0

    @property
    def is_end(self) -> bool:
        """Whether the run ended here: its rate had come down to 0."""
        return self.step == self.steps


@dataclass(frozen=True)
class Sweep:
    """The runs that were made."""

    points: tuple[Point, ...]
    failed: tuple[tuple[float, str], ...]
    """Rates of runs that diverged, and how."""
    held_out: str
    """What kept was measured on."""
    seconds: float

    @property
    def best(self) -> Point | None:
        """The best end of a run: points on the way there have no run of their own."""
        ends = [point for point in self.points if point.is_end]
        return max(ends, key=lambda point: point.score, default=None)

    @property
    def warning(self) -> str | None:
        """What speaks against the best, in a sentence."""
        best = self.best
        if best is None or best.forgotten >= _ENOUGH:
            return None
        return (
            f"the best run forgot only {best.forgotten:.1%}: allow more steps or minutes, and see "
            "with `mollm preview` whether the model knows the answers."
        )

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in both, by what they forgot."""
        found = [
            point
            for point in self.points
            if not any(
                other.forgotten >= point.forgotten
                and other.kept >= point.kept
                and (other.forgotten, other.kept) != (point.forgotten, point.kept)
                for other in self.points
            )
        ]
        return tuple(sorted(found, key=lambda point: point.forgotten))


def sweep(
    model: str,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    minutes: float,
    adapter: Any | None = None,
    say: Say = lambda text: None,
) -> Sweep:
    """Tries learning rates and lengths for some minutes.

    From the given rate upwards by factors of four while more than half is kept, else downwards;
    then between the best rate and its neighbours; then half and twice as many steps at the best.

    Args:
        model: As for MOLLMTrainer, by name.
        data: forget and retain, and eval_forget and eval_retain where there are such.
        settings: Of a MOLLMConfig: learning_rate and max_steps are where to begin.
        minutes: No run is begun that would end after them, judged by those before; the first one
            always is.
        adapter: A LoraConfig, or None.
        say: Called with a line of progress.

    Raises:
        UsageError: A run is refused, or the budget is not positive.
    """
    if not minutes > 0:
        raise UsageError(f"minutes must be positive, but got {minutes}.")
    if settings["max_steps"] < 1:
        raise UsageError(f"max_steps must be at least 1, but got {settings['max_steps']}.")
    runs = _Runs(model, *_sets(data), dict(settings), minutes * 60, adapter, say)
    with _quiet():
        _search(runs, float(settings["learning_rate"]), int(settings["max_steps"]))
    return Sweep(
        tuple(runs.points), tuple(runs.failed), runs.held_out, time.monotonic() - runs.started
    )


def _search(runs: _Runs, rate: float, steps: int) -> None:
    if runs.make(rate, steps) is None:
        raise UsageError(
            f"a sweep must begin with a rate at which the losses do not diverge, but got {rate:g}: "
            "give a smaller --learning-rate."
        )
    up = rate
    while (last := runs.ends.get((up, steps))) is not None and last.kept > _WORN:
        up = _rounded(up * _FACTOR)
        if not runs.can_make(steps):
            return
        if up > _LARGEST:
            break
        runs.make(up, steps)
    best = runs.best(steps)
    while best is not None and best.learning_rate == min(r for r, s in runs.ends if s == steps):
        down = _rounded(best.learning_rate / _FACTOR)
        if not runs.can_make(steps):
            return
        end = runs.make(down, steps)
        if end is None or end.score <= best.score:
            break
        best = end
    for factor in (_FACTOR**0.5, _FACTOR**-0.5, _FACTOR**0.25, _FACTOR**-0.25):
        best = runs.best(steps)
        if best is None or not runs.can_make(steps):
            return
        runs.make(_rounded(best.learning_rate * factor), steps)
    best = runs.best(steps)
    for length in (2 * steps, max(_LOOKS, steps // 2)):
        if best is not None and runs.can_make(length):
            runs.make(best.learning_rate, length)


def _rounded(rate: float) -> float:
    """A rate that nobody gave, in two digits."""
    return float(f"{rate:.2g}")


class _Runs:
    """Makes runs within a budget, and keeps what they came to."""

    def __init__(
        self,
        model: str,
        train: Mapping[str, list[Record]],
        evaluate: Mapping[str, list[Record]],
        settings: dict[str, Any],
        seconds: float,
        adapter: Any | None,
        say: Say,
    ) -> None:
        self._model, self._train, self._evaluate = model, train, evaluate
        self._settings, self._adapter, self._say = settings, adapter, say
        self.started = time.monotonic()
        self._until = self.started + seconds
        self._setup = self._per_step = 0.0
        self.points: list[Point] = []
        self.ends: dict[tuple[float, int], Point | None] = {}
        self.failed: list[tuple[float, str]] = []
        self._original: dict[str, float] = {}

    @property
    def held_out(self) -> str:
        """What kept was measured on, in words."""
        own = {id(record) for record in _all_of(self._train, "retain")}
        rows = _all_of(self._evaluate, "retain")
        trained = sum(id(record) in own for record in rows)
        what = {0: "that no run trained on", len(rows): "that are trained on"}
        return f"{len(rows)} retain rows {what.get(trained, f'of which {trained} are trained on')}"

    def best(self, steps: int) -> Point | None:
        ends = [end for (_, s), end in self.ends.items() if end is not None and s == steps]
        return max(ends, key=lambda end: end.score, default=None)

    def can_make(self, steps: int) -> bool:
        """Whether a run of so many steps would end in time."""
        return time.monotonic() + self._setup + steps * self._per_step <= self._until

    def make(self, rate: float, steps: int) -> Point | None:
        """Trains at a rate, and says where that ends; None where it diverges."""
        if (rate, steps) in self.ends:
            return self.ends[rate, steps]
        begun = time.monotonic()
        every = max(1, steps // _LOOKS)
        with tempfile.TemporaryDirectory(prefix="mollm-tune-") as folder:
            trainer = MOLLMTrainer(
                self._model,
                MOLLMConfig(
                    output_dir=folder,
                    **{
                        **self._settings,
                        "learning_rate": rate,
                        "max_steps": steps,
                        "save_strategy": "no",
                        "eval_strategy": "no",
                        "load_best_model_at_end": False,
                        "disable_tqdm": True,
                        "report_to": [],
                        "sample_replies": 0,
                        "stop_when": {"forget_probability": 0.0, "steps": every},
                    },
                ),
                forget_dataset=_as_given(self._train, "forget"),
                retain_dataset=_as_given(self._train, "retain"),
                eval_dataset=self._evaluate,
                peft_config=self._adapter,
            )
            if not self._original:
                self._original = trainer.look()
            trainer.pop_callback(_printer())
            ready = time.monotonic()
            trainer.train()
            logs, failure = trainer.state.log_history, trainer.stop_reason
        del trainer
        gc.collect()
        self._setup = max(self._setup, ready - begun)
        self._per_step = max(self._per_step, (time.monotonic() - ready) / steps)
        found = [self._point(rate, steps, log) for log in logs if "stop_forget_probability" in log]
        if failure is not None:
            self.failed.append((rate, failure))
            self._say(f"  {rate:<9.2g} {steps:>5} steps  diverged")
            self.ends[rate, steps] = None
            return None
        self.points += found
        end = self.ends[rate, steps] = found[-1]
        self._say(
            f"  {rate:<9.2g} {steps:>5} steps  forgotten {end.forgotten:6.1%}  kept "
            f"{end.kept:6.1%}  score {end.score:.3f}"
        )
        return end

    def _point(self, rate: float, steps: int, log: Mapping[str, float]) -> Point:
        def share(role: str) -> float:
            name = f"{role}_probability"
            return min(1.0, log[f"stop_{name}"] / max(self._original[name], 1e-30))

        return Point(rate, steps, int(log["step"]), 1 - share("forget"), share("retain"))


def _sets(
    data: Mapping[str, Any],
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """What is trained on and what is looked at, by objective: of each retain set a part is held
    out where no other rows are given for that, and so is nothing of the forget sets, all of which
    must go."""
    train: dict[str, list[Record]] = {}
    evaluate: dict[str, list[Record]] = {}
    for role in ROLES:
        own = {n: records_of(one, role) for n, one in named_sets(data[role], role).items()}
        given = data.get(f"eval_{role}")
        train |= own
        evaluate |= (
            {n: records_of(one, role) for n, one in named_sets(given, role).items()}
            if given
            else own
        )
    if not data.get("eval_retain"):
        for name in [name for name in train if role_of(name) == "retain"]:
            train[name], evaluate[name] = _held_out(train[name])
    return train, evaluate


def _held_out(rows: list[Record]) -> tuple[list[Record], list[Record]]:
    """Rows to train on and rows to look at: the same ones where there are few."""
    count = min(_MOST_HELD_OUT, int(_HELD_OUT * len(rows)))
    if count < _FEWEST_HELD_OUT:
        return rows, rows
    stride = len(rows) // count
    held = set(range(0, stride * count, stride))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _all_of(sets: Mapping[str, list[Record]], role: Role) -> list[Record]:
    return [record for name, rows in sets.items() if role_of(name) == role for record in rows]


def _as_given(sets: Mapping[str, list[Record]], role: Role) -> Any:
    """The sets of a role as a trainer takes them: one alone, or several by their own names."""
    if role in sets:
        return sets[role]
    return {n.removeprefix(f"{role}_"): r for n, r in sets.items() if role_of(n) == role}


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what every run would say anew."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
