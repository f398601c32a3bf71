"""The highest rate is found in few tries, wherever it is."""

from __future__ import annotations

import pytest

from tunesmith.bench.search import bracket, next_rate


def find(true_rate, start, tolerance=0.1):
    kept = {}
    while (rate := next_rate(kept, start, tolerance)) is not None:
        kept[rate] = rate <= true_rate
        assert len(kept) < 30
    return bracket(kept)[0], len(kept)


@pytest.mark.parametrize("true_rate", [0.9, 3.7, 10.0, 61.0])
def test_it_is_found_to_the_tolerance(true_rate):
    found, tries = find(true_rate, start=10.0)
    assert true_rate / 1.1 <= found <= true_rate
    assert tries <= 11
    assert find(true_rate, 10.0, tolerance=0.02)[0] >= true_rate / 1.02


def test_nothing_keeps_a_promise_that_none_can():
    found, tries = find(0.0, start=10.0)
    assert found is None and tries <= 7


def test_luck_above_a_broken_rate_counts_for_nothing():
    kept = {4.0: True, 8.0: False, 12.0: True}
    assert bracket(kept) == (4.0, 8.0)
    assert next_rate(kept, 10.0, 0.1) == pytest.approx(32**0.5)
    assert next_rate({2.0: True}, 10.0, 0.1) == 3.0, "upwards from what the recipe measured"
