"""Intervals cover what they promise, pairing narrows them, faults are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.statistics import paired_relative_difference, percentile, ratio_of_sums


def test_values_are_exact() -> None:
    assert percentile(range(1, 102), 50).value == 51
    assert percentile(range(1, 102), 95).value == 96
    assert ratio_of_sums([2.0, 10.0], [1.0, 5.0]).value == 2.0
    assert paired_relative_difference([3, 6], [1, 2], [2, 4], [1, 2]).value == pytest.approx(0.5)


def test_a_constant_has_no_uncertainty() -> None:
    assert percentile([7.0] * 30, 95) == (7.0, 7.0, 7.0)
    assert ratio_of_sums([4.0] * 9, [2.0] * 9) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage_is_the_confidence(confidence: float) -> None:
    random = np.random.default_rng(5)
    trials = 300
    mean_hits = median_hits = 0
    for trial in range(trials):
        samples = random.exponential(size=80)
        mean = ratio_of_sums(samples, np.ones(80), confidence=confidence, seed=trial)
        median = percentile(samples, 50, confidence=confidence, seed=trial)
        mean_hits += mean.low <= 1.0 <= mean.high
        median_hits += median.low <= np.log(2) <= median.high
    # Three standard errors of a binomial share, and two points for the small sample.
    slack = 3 * (confidence * (1 - confidence) / trials) ** 0.5 + 0.02
    assert abs(mean_hits / trials - confidence) < slack
    assert abs(median_hits / trials - confidence) < slack


def test_pairing_finds_a_difference_that_two_intervals_cannot() -> None:
    random = np.random.default_rng(11)
    tokens = random.integers(5, 60, size=200).astype(float)
    hardness = random.gamma(2.0, 1.0, size=200)
    reference = tokens * hardness
    slightly_worse = reference * (1.01 + 0.01 * random.standard_normal(200))
    difference = paired_relative_difference(slightly_worse, tokens, reference, tokens)
    assert 0.005 < difference.low < difference.value < difference.high < 0.015
    alone, other = ratio_of_sums(slightly_worse, tokens), ratio_of_sums(reference, tokens)
    assert alone.low < other.high


def test_the_seed_decides() -> None:
    samples = list(np.random.default_rng(1).normal(size=5000))
    assert percentile(samples, 99, seed=3) == percentile(samples, 99, seed=3)
    assert percentile(samples, 99, seed=3) != percentile(samples, 99, seed=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: percentile([], 50),
        lambda: percentile([1.0, float("nan")], 50),
        lambda: ratio_of_sums([1.0], [1.0, 2.0]),
    ],
)
def test_unusable_samples_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"needed|finite|paired"):
        call()
