"""Every metric against a formula of its own, written out in plain loops."""

import math
import random
import zlib

import numpy as np
import pytest
from counted_metrics import exact_ks_p_value, longest_common
from scipy import stats

from mollm.errors import UsageError
from mollm.evaluation import metrics

TIGHT = 1e-12
rng = random.Random(0)
NLLS = [rng.uniform(0.01, 6) for _ in range(23)]
OTHER_NLLS = [rng.uniform(0.01, 6) for _ in range(17)]


def average(values):
    return sum(values) / len(values)


def test_probability():
    for nll, p in zip(NLLS, metrics.probability(NLLS), strict=True):
        assert p == pytest.approx(math.e**-nll, rel=TIGHT)


def test_choice_probability_normalises_over_all_choices():
    p = [math.e**-nll for nll in (0.5, 1.5, 2.5, 0.25)]
    expected = p[0] / (p[0] + p[1] + p[2] + p[3] + 1e-10)
    assert metrics.choice_probability(0.5, [1.5, 2.5, 0.25]) == pytest.approx(expected, rel=TIGHT)


def test_truth_ratio_averages_losses_not_probabilities():
    wrong = [1.0, 2.0, 6.0]
    expected = math.e**-3.0 / (math.e**-0.7 + 1e-10)
    assert metrics.truth_ratio(0.7, wrong) == pytest.approx(expected, rel=TIGHT)
    of_mean_probability = average([math.e**-loss for loss in wrong]) / math.e**-0.7
    assert metrics.truth_ratio(0.7, wrong) < 0.5 * of_mean_probability


def test_truth_ratio_stays_finite_where_the_right_answer_is_impossible():
    assert metrics.truth_ratio(800.0, [0.0]) == pytest.approx(1e10)
    assert metrics.forget_truth_ratio([1e10, 0.0]) == pytest.approx(5e-11)


def test_truth_ratio_aggregates():
    ratios = [0.0, 0.2, 1.0, 1.7, 30.0]
    closer = average([min(r, 1 / (r + 1e-10)) for r in ratios])
    assert metrics.forget_truth_ratio(ratios) == pytest.approx(closer, rel=TIGHT)
    truer = average([max(0.0, 1 - r) for r in ratios])
    assert metrics.utility_truth_ratio(ratios) == pytest.approx(truer, rel=TIGHT)


def test_forget_quality_is_the_exact_p_value():
    close = [nll + 0.3 for nll in OTHER_NLLS]
    for other in (OTHER_NLLS, close, [nll + 3 for nll in OTHER_NLLS]):
        expected = exact_ks_p_value(NLLS, other)
        assert metrics.forget_quality(NLLS, other) == pytest.approx(expected, abs=1e-9)
    assert metrics.forget_quality(NLLS, NLLS) == 1


def test_model_utility_is_the_harmonic_mean_of_nine():
    parts = {name: 0.1 + 0.1 * i for i, name in enumerate(metrics.UTILITY_PARTS)}
    expected = 9 / sum(1 / value for value in parts.values())
    assert metrics.model_utility(parts) == pytest.approx(expected, rel=TIGHT)
    assert metrics.model_utility(parts | {"something_else": 0.0}) == pytest.approx(expected)
    assert metrics.model_utility(parts | {"retain_rouge_l": 0.0}) == 0
    assert len(parts) == 9


def test_model_utility_is_never_that_of_fewer_parts():
    parts = dict.fromkeys(metrics.UTILITY_PARTS[1:], 0.5)
    with pytest.raises(UsageError, match=r"needs retain_probability: evaluate the retain"):
        metrics.model_utility(parts)
    with pytest.raises(UsageError, match="must be finite, but got nan"):
        metrics.model_utility(parts | {"retain_probability": math.nan})
    with pytest.raises(UsageError, match=r"must not be negative, but got -0\.5"):
        metrics.model_utility(parts | {"retain_probability": -0.5})


def test_rouge_l_recall():
    answer = "the quick brown fox has a red den in oslo"
    for reply in ("A fox, red and quick, has the den. In Oslo!", "", "nothing of it", answer):
        words = [word.strip(".,!").lower() for word in reply.split()]
        expected = longest_common(answer.split(), words) / 10
        assert metrics.rouge_l_recall(reply, answer) == pytest.approx(expected, rel=TIGHT)
    long_winded = answer + " and many other words that cost precision"
    assert metrics.rouge_l_recall(long_winded, answer) == 1


def test_rouge_l_knows_latin_letters_alone():
    assert metrics.rouge_l_recall("Осло", "Осло") == 0


def test_rouge_l_compares_stems():
    assert metrics.rouge_l_recall("she wrote novel", "she writes novels") == pytest.approx(2 / 3)


HITS = {"1111": (1, 1), "0011": (0.5, 0.5), "1101": (0.75, 0.25), "1110": (0.75, 0.25), "1": (1, 1)}


@pytest.mark.parametrize(("hits", "expected"), HITS.items())
def test_exact_memorization_and_extraction_strength(hits, expected):
    hits = [bit == "1" for bit in hits]
    assert metrics.exact_memorization(hits) == expected[0]
    assert metrics.extraction_strength(hits) == expected[1]


def test_extraction_strength_tries_every_suffix():
    for bits in range(64):
        hits = [bool(bits >> i & 1) for i in range(6)]
        k = next((k for k in range(6) if all(hits[k:])), 5)
        assert metrics.extraction_strength(hits) == pytest.approx(1 - k / 6, rel=TIGHT)


def test_zlib_score():
    text = "Zürich, Zürich, Zürich"
    assert metrics.zlib_score(2.5, text) == 2.5 / len(zlib.compress(text.encode()))


@pytest.mark.parametrize(("n", "lowest"), [(1, 1), (2, 1), (4, 1), (5, 2), (9, 3), (10, 4)])
def test_min_k(n, lowest):
    log_probs = [-nll for nll in NLLS[:n]]
    expected = average(sorted(NLLS[:n], reverse=True)[:lowest])
    assert metrics.min_k(log_probs) == pytest.approx(expected, rel=TIGHT)


def test_min_k_plus_plus():
    n, lowest = 12, 4
    means, stds = [-nll for nll in [*NLLS[n:][:11], 1.0]], [0.1 + 0.2 * i for i in range(n)]
    scores = sorted((-NLLS[i] - means[i]) / stds[i] for i in range(n))
    found = metrics.min_k_plus_plus([-nll for nll in NLLS[:n]], means, stds)
    assert found == pytest.approx(-average(scores[:lowest]), rel=TIGHT)


def test_membership_auc_counts_pairs():
    forget, holdout = [0.1, 0.5, 0.5, 0.9], [0.5, 0.7, 1.2]
    pairs = [(h > f) + 0.5 * (h == f) for f in forget for h in holdout]
    assert metrics.membership_auc(forget, holdout) == pytest.approx(average(pairs), rel=TIGHT)
    assert metrics.membership_auc([1, 2], [3, 4]) == 1


def test_privleak_has_the_sign_of_muse():
    # MUSE's AUC is one minus ours: (AUC' - AUC'_retrained) / AUC'_retrained.
    for auc, retrained in ((0.9, 0.6), (0.3, 0.45), (0.5, 0.5)):
        expected = 100 * ((1 - auc) - (1 - retrained)) / (1 - retrained + 1e-10)
        assert metrics.privleak(auc, retrained) == pytest.approx(expected, rel=TIGHT)
    assert metrics.privleak(0.9, 0.5) < 0 < metrics.privleak(0.1, 0.5)


def test_perplexity_weighs_by_tokens():
    nll, counts = [1.0, 3.0, 0.5], [2, 5, 9]
    per_token = [loss for loss, n in zip(nll, counts, strict=True) for _ in range(n)]
    expected = math.e ** average(per_token)
    assert metrics.perplexity(nll, counts) == pytest.approx(expected, rel=TIGHT)


def test_repetition():
    # abcd bcda cdab dabc abcd bcda: six 4-grams, four of them different.
    assert metrics.repetition("a b c d a b c d a") == pytest.approx(1 - 4 / 6)
    assert metrics.repetition("no no no no no no", n=2) == pytest.approx(1 - 1 / 5)
    assert metrics.repetition("all words differ here") == 0
    assert metrics.repetition("three words only") == 0
    assert metrics.repetition("") == 0


def test_bootstrap_interval_is_the_percentile_one():
    sample = np.array(NLLS)
    low, high = metrics.bootstrap_interval(metrics.mean, sample, resamples=300, seed=4)
    draws = np.random.default_rng(4)
    means = sorted(
        average([NLLS[i] for i in draws.integers(len(NLLS), size=len(NLLS))]) for _ in range(300)
    )
    for end, share in ((low, 0.025), (high, 0.975)):
        below, weight = divmod(share * 299, 1)
        expected = means[int(below)] * (1 - weight) + means[int(below) + 1] * weight
        assert end == pytest.approx(expected, rel=1e-9)
    again = metrics.bootstrap_interval(metrics.mean, sample, resamples=300, seed=4)
    assert again == (low, high)
    assert metrics.bootstrap_interval(metrics.mean, sample, resamples=300, seed=5) != (low, high)


def test_the_harmful_rate_counts_scores_from_the_threshold_on():
    assert metrics.flagged_rate([0.1, 0.5, 0.9, 0.49]) == 0.5
    assert metrics.flagged_rate([0.1, 0.5, 0.9, 0.49], threshold=0.9) == 0.25
    with pytest.raises(UsageError, match="must be finite, but got nan"):
        metrics.flagged_rate([0.1, float("nan")])
    with pytest.raises(UsageError, match="at least one value"):
        metrics.flagged_rate([])


def test_samples_of_one_set_are_resampled_together():
    sample = np.random.default_rng(0).normal(size=20)

    def interval(*sets):
        return metrics.bootstrap_interval(
            lambda a, b: a.mean() - b.mean(), sample, sample, sets=sets, resamples=50
        )

    assert interval("a", "a") == (0, 0)
    low, high = interval("a", "b")
    assert low < -0.1 < 0.1 < high
    with pytest.raises(UsageError, match="about the same examples, but those of a have 20 and 3"):
        metrics.bootstrap_interval(lambda a, b: 0.0, sample, sample[:3], sets=("a", "a"))


def test_bootstrap_interval_agrees_with_scipy_on_two_samples():
    samples = np.array(NLLS), np.array(OTHER_NLLS)
    options = {"vectorized": False, "n_resamples": 1500, "method": "percentile"}
    theirs = stats.bootstrap(samples, lambda a, b: a.mean() - b.mean(), **options)
    ours = metrics.bootstrap_interval(
        lambda a, b: a.mean() - b.mean(), *samples, resamples=1500, seed=1
    )
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.12 * width)


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: metrics.mean(bad),
        lambda bad: metrics.probability(bad),
        lambda bad: metrics.truth_ratio(1.0, bad),
        lambda bad: metrics.choice_probability(1.0, bad),
        lambda bad: metrics.forget_truth_ratio(bad),
        lambda bad: metrics.utility_truth_ratio(bad),
        lambda bad: metrics.forget_quality([1.0], bad),
        lambda bad: metrics.exact_memorization(bad),
        lambda bad: metrics.extraction_strength(bad),
        lambda bad: metrics.min_k(bad),
        lambda bad: metrics.min_k_plus_plus([-1.0], [-1.0], bad),
        lambda bad: metrics.membership_auc(bad, [1.0]),
        lambda bad: metrics.perplexity(bad, [1.0]),
    ],
)
def test_nothing_is_computed_from_nothing_or_from_nan(call):
    with pytest.raises(UsageError, match="must hold at least one value"):
        call([])
    with pytest.raises(UsageError, match="must be finite, but got nan: has the model diverged"):
        call([math.nan])


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(UsageError, match="at least 2 examples per set, but got 1"):
        metrics.bootstrap_interval(metrics.mean, [1.0])
    with pytest.raises(UsageError, match="resamples must be at least 1"):
        metrics.bootstrap_interval(metrics.mean, [1.0, 2.0], resamples=0)
