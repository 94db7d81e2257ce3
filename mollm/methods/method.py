"""What a method is, and the forget loss that most of them share."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mollm.errors import UsageError, did_you_mean
from mollm.methods.answers import AnswerTokens
from mollm_ops import linear_uce_loss

ForgetLoss = Callable[[AnswerTokens, Callable[[], AnswerTokens]], Tensor]
"""A scalar to minimise on the forget batch, from the model's answers there and, where asked for,
the frozen original's. A mean divides by `AnswerTokens.tokens` or `AnswerTokens.sequences`."""

RetainLoss = Callable[[AnswerTokens, AnswerTokens], Tensor]
"""A scalar to minimise on the retain batch in place of the cross-entropy, from the model's answers
there and the original's."""

Weights = dict[str, float]
"""Preferences by the names of objectives."""

GIVEN, REFUSALS, GENERATED = "given", "refusals", "generated"
"""Where alternative answers come from: the data's column `alternate`, texts that ship, or, for rows
without that column, the original model."""


@dataclass(frozen=True)
class Seen:
    """What a method that adapts its weights knows once a step was made."""

    losses: Mapping[str, float]
    """Before the step, by objective."""
    epoch: float
    """Passes over the forget set when the step began."""
    applied: int
    """Steps so far, without those that were skipped because a gradient was not finite."""


@dataclass(frozen=True)
class Method:
    """A loss on what is to be forgotten, and how its gradient meets those of KL and retain.

    Keyword-only arguments of the functions below are the method's hyperparameters, and their
    defaults those that its authors published.

    Example:
        >>> mine = Method("mine", unlearning_cross_entropy, "project", (1.0, 10.0, 1.0))
        >>> mine.optimizer_options()["direction"]
        'project'
        >>> mine.hyperparameters
        {'eps': 0.0001}
    """

    name: str
    forget_loss: ForgetLoss
    direction: str
    """A direction of MOLLMOptimizer."""
    preferences: tuple[float, float, float] | None = None
    """Weights of forget, kl and retain; None for directions without."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of MOLLMOptimizer. Without one the metric is Euclidean."""
    compares: bool = False
    """Whether the forget loss asks for the original's answers."""
    retain_loss: RetainLoss | None = None
    """In place of the cross-entropy on the retain set."""
    alternatives: str | None = None
    """Where the alternative answers come from that `AnswerTokens.alternative` holds, if any."""
    freeze: Callable[..., None] | None = None
    """(model) → None: takes out of training what the method does not change. Not with an adapter,
    with which its hyperparameters are refused but for `layer`: that is the block whose output
    `AnswerTokens.states` holds."""
    adapt: Callable[..., Weights] | None = None
    """(weights now, weights at the start, Seen or None) → weights of the next step; Seen is None
    before the first."""
    gate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    """The objectives' gradients of one parameter, [...] each, element by element: what is left of
    each for the direction."""
    finish: Callable[..., Tensor] | None = None
    """(parameter as trained, as it was before) → as it is left, once the last step is made."""
    base_options: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that are options of the optimizer's base."""
    positive: tuple[str, ...] = ("beta",)
    """The hyperparameters that may not be 0."""
    checks: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    """By hyperparameter: what raises a UsageError for a value of the right kind that it may not
    have."""

    @property
    def is_a_loss(self) -> bool:
        """Whether a loss on the forget set and a direction are all that makes the method."""
        more = (self.retain_loss, self.alternatives, self.adapt, self.gate, self.finish)
        return all(each is None for each in more)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Names and published values of all that `method_options` of a run may set."""
        functions = (self.forget_loss, self.retain_loss, self.freeze, self.adapt, self.finish)
        found = dict(self.base_options)
        for function in functions:
            found = {**_keyword_defaults(function), **found}
        return found

    @property
    def of_freezing(self) -> tuple[str, ...]:
        """The hyperparameters without effect where an adapter trains, for `freeze` alone has
        them."""
        return tuple(name for name in _keyword_defaults(self.freeze) if name != "layer")

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters, with those that are chosen in place of the published ones.

        Raises:
            UsageError: A name is not one of the method's, or a value is out of its range.

        Example:
            >>> from mollm.methods import find_method
            >>> find_method("npo").settings({"beta": 0.2})
            {'beta': 0.2}
            >>> find_method("npo").settings({"betta": 0.2})
            Traceback (most recent call last):
            mollm.errors.UsageError: method_options of npo must be of beta, but got 'betta'; ...
        """
        known = self.hyperparameters
        for name in chosen:
            if name not in known:
                takes = f"be of {', '.join(known)}" if known else "be left out: it has none"
                raise UsageError(
                    f"method_options of {self.name} must {takes}, but got {name!r}"
                    f"{did_you_mean(str(name), known)}"
                )
        return known | {name: self._checked(name, value) for name, value in chosen.items()}

    def bound(
        self, function: Callable[..., Any], settings: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """One of the method's functions with its hyperparameters."""
        takes = _keyword_defaults(function)
        mine = {name: settings[name] for name in takes if settings[name] != takes[name]}
        return functools.partial(function, **mine) if mine else function

    def optimizer_options(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keyword arguments for MOLLMOptimizer with the objectives forget, kl, retain."""
        chosen = settings or {}
        return {
            "direction": self.direction,
            "preferences": self.preferences,
            "metric": "euclidean",
            **self.options,
            **{name: chosen.get(name, value) for name, value in self.base_options.items()},
        }

    def _checked(self, name: str, value: Any) -> Any:
        taken = self._of_its_kind(name, value)
        if name in self.checks:
            self.checks[name](taken)
        return taken

    def _of_its_kind(self, name: str, value: Any) -> Any:
        default = self.hyperparameters[name]
        if isinstance(default, bool) or not isinstance(default, int | float):
            pair = isinstance(default, tuple) and isinstance(value, list)
            if default is not None and not pair and not isinstance(value, type(default)):
                kind = "true or false" if isinstance(default, bool) else _KINDS[type(default)]
                raise UsageError(f"{name} of {self.name} must be {kind}, but got {value!r}.")
            return value
        number = None if isinstance(value, bool) else value
        whole = isinstance(default, int)
        if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            number = None
        if number is None or (whole and number != int(number)):
            kind = "a whole number from 0" if whole else "a number from 0"
            raise UsageError(f"{name} of {self.name} must be {kind}, but got {value!r}.")
        if name in self.positive and number == 0:
            raise UsageError(f"{name} of {self.name} must be positive, but got {value!r}.")
        return int(number) if whole else float(number)


_KINDS: dict[type, str] = {str: "a text", list: "a list", tuple: "a list", dict: "options by name"}


def _keyword_defaults(function: Callable[..., Any] | None) -> dict[str, Any]:
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def unlearning_cross_entropy(
    answers: AnswerTokens, reference: Callable[[], AnswerTokens], *, eps: float = 1e-4
) -> Tensor:
    """UCE, see `mollm_ops.linear_uce_loss`: bounded, unlike ascent on the cross-entropy."""
    return linear_uce_loss(
        answers.hidden,
        answers.weight,
        answers.target,
        **answers.head_options,
        eps=eps,
        normalizer=answers.tokens,
    )


PREFERENCES = (1.0, 20.0, 1.0)
"""Weights of forget, kl and retain, for the directions that take any. The gradient of KL starts at
zero and stays the smallest of the three: at weight 1 the model drifts away from its original, and
answers other questions worse, long before the facts are forgotten."""


OBJECTIVES = ("forget", "kl", "retain")
"""Of a run with one set to forget and one to retain. Where there are several, each has an objective
of its own, "forget_alice" or "retain_code"; KL is that of all that is to be retained."""


def role_of_objective(name: str) -> str:
    """Which of the three an objective is.

    Example:
        >>> role_of_objective("retain_code")
        'retain'
    """
    return name.split("_")[0]
