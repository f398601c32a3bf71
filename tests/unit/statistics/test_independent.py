"""Two runs that share nothing: what resampling and rounds say of their difference."""

from __future__ import annotations

import math
import random

import pytest

from tunesmith.statistics import Interval
from tunesmith.statistics.independent import (
    difference_in_turns,
    relative_difference,
    with_rounds,
)


def around(value: float, half: float) -> Interval:
    return Interval(value, value * (1 - half), value * (1 + half))


def test_resampling_decides_where_rounds_agree() -> None:
    found = relative_difference(around(110, 0.02), around(100, 0.02), [110, 110], [100, 100])
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - 1.1 * 0.0283, abs=0.003)
    assert relative_difference(around(110, 0.02), around(100, 0.02)) == found


def test_rounds_decide_where_they_lie_further_apart() -> None:
    apart = relative_difference(around(110, 0.001), around(100, 0.001), [104, 116], [95, 105])
    assert apart.low < 0 < apart.value
    more = relative_difference(
        around(110, 0.001), around(100, 0.001), [104, 116] * 4, [95, 105] * 4
    )
    assert more.low > 0, "the same spread in more rounds says more"


def test_an_interval_of_few_rounds_covers_what_it_should() -> None:
    """Log-normal rounds of 3 % around 100; the interval of three of them holds 100 at 95 %."""
    own = random.Random(5)
    held = 0
    for _ in range(400):
        rounds = [100 * math.exp(own.gauss(0, 0.03)) for _ in range(3)]
        found = with_rounds(around(sum(rounds) / 3, 0.0001), rounds)
        held += found.low <= 100 <= found.high
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_rounds_in_turns_know_what_a_machine_does_meanwhile() -> None:
    """It drifts by a third and jumps by a quarter: 4 % between the two are found all the same,
    and equal ones are told apart at the rate that 95 % allows."""
    own = random.Random(7)
    apart = found = 0
    for _ in range(400):
        machine = [100 * (1 + at / 24) * own.choice([0.8, 1.0]) for at in range(8)]
        one, other = ([level * math.exp(own.gauss(0, 0.01)) for level in machine] for _ in "ab")
        interval = difference_in_turns(one, other)
        apart += not interval.low <= 0 <= interval.high
        found += difference_in_turns([0.96 * level for level in one], other).high < 0
        unpaired = relative_difference(around(96, 0.01), around(100, 0.01), one, other)
        assert unpaired.low < 0 < unpaired.high
    assert 0.03 * 400 <= apart <= 0.08 * 400
    assert found >= 0.95 * 400


def test_a_spike_within_a_pair_hides_nothing() -> None:
    """The interval is that of Wilcoxon's test, whose critical value for twelve pairs is 13."""
    rounds = [95.0, 96, 94, 95.5, 94.5, 95, 96, 95, 94, 97, 95, 140]
    found = difference_in_turns(rounds, [100.0] * 12)
    assert found.low < -0.045 < found.high < 0
    logs = [math.log(one / 100) for one in rounds]
    means = sorted((a + b) / 2 for at, a in enumerate(logs) for b in logs[at:])
    assert found.low == pytest.approx(math.expm1(means[13]))
    assert found.high == pytest.approx(math.expm1(means[-14]))


@pytest.mark.parametrize("pairs", [3, 6, 10])
def test_an_interval_of_pairs_covers_what_it_should(pairs: int) -> None:
    own = random.Random(pairs)
    held = 0
    for _ in range(600):
        rounds = [math.exp(own.gauss(0, 0.05)) for _ in range(pairs)]
        found = difference_in_turns(rounds, [1.0] * pairs)
        held += found.low <= 0 <= found.high
    assert 0.93 * 600 <= held <= 0.985 * 600


def test_two_rounds_and_nothing_change_nothing() -> None:
    assert with_rounds(around(5, 0.1), [4, 6]) == around(5, 0.1)
    assert with_rounds(Interval(0, 0, 0), [0, 0]) == Interval(0, 0, 0)
    with pytest.raises(ValueError, match="relative to nothing"):
        relative_difference(Interval(0, 0, 0), around(1, 0.1))
