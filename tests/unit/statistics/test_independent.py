"""Two runs that share nothing: what resampling and rounds say of their difference."""

from __future__ import annotations

import math
import random

import pytest

from tunesmith.statistics import Interval
from tunesmith.statistics.independent import relative_difference, with_rounds


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


def test_two_rounds_and_nothing_change_nothing() -> None:
    assert with_rounds(around(5, 0.1), [4, 6]) == around(5, 0.1)
    assert with_rounds(Interval(0, 0, 0), [0, 0]) == Interval(0, 0, 0)
    with pytest.raises(ValueError, match="relative to nothing"):
        relative_difference(Interval(0, 0, 0), around(1, 0.1))
