"""Findings: the value, its limits, and the setting that is told."""

from __future__ import annotations

import numpy as np
import pytest

from mollm.audit.attacks import membership
from mollm.audit.findings import (
    FAILS_FROM,
    PASSES_TO,
    Scale,
    judge,
    judge_kept,
    percent,
    verdict_on,
    worst,
)


def scores(*values, settings=("",)):
    return {name: (np.array(values, dtype=float),) for name in settings}


def judged(model, original, retain_only=None, **options):
    return judge("it", Scale(), model, original, retain_only, resamples=100, **options)


def test_the_value_is_the_way_from_never_seen_to_the_original():
    found = judged(scores(0.3, 0.5), scores(0.9, 0.9), scores(0.1, 0.3))
    assert found.value == pytest.approx((0.4 - 0.2) / (0.9 - 0.2))
    assert (found.model, found.original, found.retain_only) == pytest.approx((0.4, 0.9, 0.2))
    assert found.examples == 2
    alone = judged(scores(0.3, 0.5), scores(0.9, 0.9))
    assert alone.value == pytest.approx(0.4 / 0.9)
    assert alone.retain_only is None


def test_models_are_resampled_together():
    model, original = np.linspace(0, 0.1, 20), np.linspace(0.1, 1, 20)
    found = judged(scores(*model), scores(*original), scores(*(0 * model)))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(100):
        picks = rng.integers(20, size=20)
        drawn.append(model[picks].mean() / original[picks].mean())
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    same = judged(scores(*original), scores(*original), scores(*model))
    assert same.interval == (1.0, 1.0)


def test_each_model_is_taken_at_its_best_setting():
    model = {"a": (np.array([0.1, 0.1]),), "b": (np.array([0.3, 0.3]),)}
    base = {"a": (np.array([0.2, 0.2]),), "b": (np.array([0.0, 0.0]),)}
    original = {"a": (np.array([0.7, 0.7]),), "b": (np.array([0.5, 0.5]),)}
    found = judged(model, original, base)
    assert found.setting == "b"
    assert (found.model, found.original, found.retain_only) == pytest.approx((0.3, 0.7, 0.2))
    assert found.value == pytest.approx(0.1 / 0.5)


def test_an_attack_that_cannot_tell_is_none():
    assert judged(scores(0.01, 0.01), scores(0.04, 0.04)) is None
    assert judged(scores(0.9, 0.9), scores(0.93, 0.93), scores(0.9, 0.9)) is None
    assert judged(scores(0.9, 0.9), scores(0.96, 0.96), scores(0.9, 0.9)) is not None


@pytest.mark.parametrize(
    ("value", "high", "verdict"),
    [
        (-0.5, 0.0, "PASS"),
        (PASSES_TO, 0.29, "PASS"),
        (PASSES_TO, FAILS_FROM, "WEAK"),
        (0.11, 0.12, "WEAK"),
        (FAILS_FROM, 0.3, "FAIL"),
        (1.2, 1.3, "FAIL"),
    ],
)
def test_verdicts(value, high, verdict):
    assert verdict_on(value, high) == verdict


def test_the_worst_verdict_decides():
    assert worst(["PASS", "PASS"]) == "PASS"
    assert worst(["PASS", "WEAK"]) == "WEAK"
    assert worst(["WEAK", "FAIL", "PASS"]) == "FAIL"


def test_few_rows_that_differ_are_no_pass():
    found = judged(scores(0, 0, 0, 0.4), scores(1, 1, 1, 1))
    assert found.value == pytest.approx(0.1)
    assert found.interval[1] >= FAILS_FROM
    assert found.verdict == "WEAK"


def test_less_like_training_data_than_never_seen_gives_membership_away_too():
    scale = membership([], []).scale
    holdout = np.arange(10.0)
    sets = {
        "original": {"": (holdout - 20, holdout)},
        "retain-only": {"": (holdout, holdout)},
        "model": {"": (holdout + 20, holdout)},
    }
    found = judge("it", scale, sets["model"], sets["original"], sets["retain-only"], resamples=50)
    assert (found.original, found.retain_only, found.model) == (0.5, 0.0, -0.5)
    assert found.value == 1
    assert found.verdict == "FAIL"


def test_of_the_retain_set_the_value_is_what_was_lost():
    original = np.array([0.8, 0.9, 1.0])
    found = judge_kept(0.95 * original, original, None, resamples=10)
    assert found.value == pytest.approx(0.05)
    assert found.verdict == "PASS"
    assert judge_kept(0 * original, original, None, resamples=10).verdict == "FAIL"


def test_of_a_retain_set_that_the_original_does_not_know_nothing_is_told():
    unknown = np.full(4, 5e-4)
    assert judge_kept(unknown, unknown, None, resamples=10) is None
    known = np.full(4, 0.02)
    assert judge_kept(known, known, None, resamples=10).value == 0


def test_a_line_says_verdict_value_interval_limit_and_all_models():
    found = judged(scores(0.3, 0.5), scores(0.9, 0.9), scores(0.1, 0.3))
    line = str(found)
    assert line.startswith("WEAK  it: 29% (")
    assert "limit 10%); likelihood 0.400, original 0.900, retain-only 0.200" in line
    assert percent(-0.001) == "0%"
