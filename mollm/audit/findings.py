"""What an attack brought back, and the verdict on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mollm.evaluation.metrics import Floats, bootstrap_interval, mean

Verdict = Literal["PASS", "WEAK", "FAIL"]

PASSES_TO = 0.1
"""The largest share of what the original knows beyond a model that never saw it."""
FAILS_FROM = 0.3
LEAST_GAP = 0.05
"""Where the original gives away less than this beyond the base line, nothing can be told."""
LEAST_KEPT = 0.01
"""Where the original gives retain rows a likelihood below this, what was lost cannot be told."""
_SMALLEST_GAP = 1e-3

Level = Callable[..., float]
"""From the scores of one model, [examples] for each set, to a number, 0 where it knows nothing."""
Scores = tuple[Floats, ...]
"""Of one model, [examples] for each set."""
Measured = Mapping[str, Scores]
"""By the setting of an attack."""


@dataclass(frozen=True)
class Scale:
    """How the scores of an attack become a number, and what it is called."""

    unit: str = "likelihood"
    level: Level = mean
    sets: tuple[str, ...] = ("forget",)
    two_sided: bool = False
    """Whether less than the base line gives something away too."""


@dataclass(frozen=True)
class Finding:
    """How much of what the original knows one attack brought back.

        value = (model - base) / (original - base)

    of mean likelihoods, or of what else `unit` says: 0 for a model that never saw the forget set, 1
    for the original. The base is what the same attack gets out of the retain-only model; without
    one it is 0.

    PASS: value ≤ threshold, and the upper end of the interval < fail_threshold. FAIL: value ≥
    fail_threshold. WEAK: all between, and a value that too few examples leave in doubt.
    """

    name: str
    value: float
    interval: tuple[float, float]
    """The 95 % percentile bootstrap interval, examples resampled for all models together."""
    threshold: float
    fail_threshold: float
    verdict: Verdict
    unit: str
    model: float
    """What the attack got out of the model, in `unit`."""
    original: float
    retain_only: float | None
    examples: int
    setting: str = ""
    """The setting of the attack that got most out of the model."""

    def __str__(self) -> str:
        low, high = self.interval
        beside = "" if self.retain_only is None else f", retain-only {self.retain_only:.3f}"
        setting = f"; {self.setting}" if self.setting else ""
        return (
            f"{self.verdict}  {self.name}: {percent(self.value)} ({percent(low)} to "
            f"{percent(high)}, limit {percent(self.threshold)}); {self.unit} {self.model:.3f}, "
            f"original {self.original:.3f}{beside}{setting}"
        )


def judge(
    name: str,
    scale: Scale,
    model: Measured,
    original: Measured,
    retain_only: Measured | None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Finding | None:
    """The finding of an attack: each model at the setting that gets most out of it.

    An attacker chooses as well for one model as for another. What a setting gets out of a model
    that never saw the rows is chance, and so is that another one gets more.

    Args:
        name: Of the finding.
        scale: What is compared.
        model: The scores of the model by setting.
        original: Those of the original.
        retain_only: Those of the retain-only model, if there is one.
        resamples: Resamples of the interval.
        seed: Of the resampling.

    Returns:
        None where the original gives away less than LEAST_GAP beyond the base line.
    """
    setting = _best(model, scale)
    others = [each for each in (original, retain_only) if each is not None]
    parts = [model[setting], *(each[_best(each, scale)] for each in others)]
    levels = [scale.level(*part) for part in parts]
    if levels[1] - (levels[2] if len(levels) > 2 else 0.0) < LEAST_GAP:
        return None
    count = len(scale.sets)

    def statistic(*samples: Floats) -> float:
        mine, first, *rest = (
            scale.level(*samples[start : start + count]) for start in range(0, len(samples), count)
        )
        base = rest[0] if rest else 0.0
        share = (mine - base) / max(first - base, _SMALLEST_GAP)
        return abs(share) if scale.two_sided else share

    arrays = [array for part in parts for array in part]
    value = statistic(*arrays)
    interval = bootstrap_interval(
        statistic,
        *arrays,
        sets=list(scale.sets) * len(parts),
        resamples=resamples,
        seed=seed,
    )
    return Finding(
        name,
        value,
        interval,
        PASSES_TO,
        FAILS_FROM,
        verdict_on(value, interval[1]),
        scale.unit,
        levels[0],
        levels[1],
        levels[2] if len(levels) > 2 else None,
        len(parts[0][0]),
        setting,
    )


def _best(measured: Measured, scale: Scale) -> str:
    return max(measured, key=lambda setting: scale.level(*measured[setting]))


def judge_kept(
    model: Floats, original: Floats, retain_only: Floats | None, **options: int
) -> Finding | None:
    """Whether the model still knows the retain set: value = 1 - model / original, what was lost.

    A model that knows nothing any more would pass all attacks. None where the original gives the
    rows less than LEAST_KEPT.
    """
    if mean(original) < LEAST_KEPT:
        return None

    def lost(mine: Floats, first: Floats) -> float:
        return 1 - mean(mine) / max(mean(first), _SMALLEST_GAP)

    interval = bootstrap_interval(lost, model, original, sets=["retain"] * 2, **options)
    value = lost(model, original)
    return Finding(
        "lost of the retain set",
        value,
        interval,
        PASSES_TO,
        FAILS_FROM,
        verdict_on(value, interval[1]),
        "likelihood",
        mean(model),
        mean(original),
        None if retain_only is None else mean(retain_only),
        len(model),
    )


def percent(share: float) -> str:
    """A share in whole percent, without a sign of nothing.

    Example:
        >>> percent(0.126), percent(-0.001)
        ('13%', '0%')
    """
    return f"{round(100 * share)}%"


def verdict_on(value: float, high: float) -> Verdict:
    """PASS up to PASSES_TO, unless the interval reaches FAILS_FROM; FAIL from there; else WEAK."""
    if value >= FAILS_FROM:
        return "FAIL"
    return "PASS" if value <= PASSES_TO and high < FAILS_FROM else "WEAK"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """FAIL if there is one, else WEAK if there is one, else PASS."""
    order: tuple[Verdict, ...] = ("FAIL", "WEAK")
    return next((one for one in order if one in verdicts), "PASS")
