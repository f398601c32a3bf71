from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.quantize.calibration import stratify

LENGTHS = [10 * at for at in range(100)]


def test_every_length_has_its_share() -> None:
    chosen = stratify(LENGTHS, [100], 10, seed=1)
    assert [at // 10 for at in chosen] == list(range(10))
    assert chosen == stratify(LENGTHS, [100], 10, seed=1) != stratify(LENGTHS, [100], 10, seed=2)


def test_every_source_has_its_share_and_a_small_one_at_least_one_row() -> None:
    chosen = stratify(LENGTHS, [66, 33, 1], 12, seed=1)
    assert [bisect_left(chosen, end) for end in (66, 99, 100)] == [7, 11, 12]


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 150), st.integers(0, 3))
def test_as_many_rows_as_wanted_and_none_twice(sizes: list[int], count: int, seed: int) -> None:
    lengths = [(at * 7919) % 31 for at in range(sum(sizes))]
    chosen = stratify(lengths, sizes, count, seed)
    assert len(chosen) == len(set(chosen)) == min(count, len(lengths))
    assert all(0 <= at < len(lengths) for at in chosen)


def test_sizes_that_do_not_add_up_are_one_source() -> None:
    assert stratify(LENGTHS, [], 5, seed=1) == stratify(LENGTHS, [100], 5, seed=1)
