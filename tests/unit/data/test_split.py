"""What is held out depends on content alone."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.split import (
    Keys,
    choose,
    count_among,
    count_distinct,
    hold_out,
    identify,
    key_of,
)

texts = st.lists(st.text(max_size=3), min_size=1, max_size=60)
fractions = st.floats(0.01, 0.99)


def keyed(texts: list[str]) -> Keys:
    return np.frombuffer(b"".join(key_of({"text": text}) for text in texts), dtype="S16")


def sides(texts: list[str], fraction: float) -> tuple[Keys, Keys]:
    keys = keyed(texts)
    held_out = hold_out(keys, fraction)
    return keys[~held_out], keys[held_out]


def ids(keys: Keys) -> Counter[str]:
    return Counter(identify(keys))


@given(texts, fractions, st.randoms())
def test_the_order_of_rows_changes_nothing(
    texts: list[str], fraction: float, random: object
) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for one, other in zip(sides(texts, fraction), sides(shuffled, fraction), strict=True):
        assert ids(one) == ids(other)
        assert ids(one[choose(one, 5, seed=1)]) == ids(other[choose(other, 5, seed=1)])


@given(texts, fractions)
def test_equal_rows_are_on_one_side_and_none_is_lost(texts: list[str], fraction: float) -> None:
    train, evaluation = sides(texts, fraction)
    assert not set(train.tolist()) & set(evaluation.tolist())
    assert len(train) + len(evaluation) == len(texts)
    if len(set(texts)) > 1:
        assert len(train)
        assert len(evaluation)


@given(texts, st.text(max_size=3))
def test_another_row_moves_no_row(texts: list[str], text: str) -> None:
    # Enough rows that some fall on either side of the bound by themselves.
    rows = [str(number) for number in range(200)] + texts
    before, _ = sides(rows, 0.5)
    after, _ = sides([*rows, text], 0.5)
    assert set(before.tolist()) <= set(after.tolist())


def test_the_share_is_kept() -> None:
    _, evaluation = sides([str(number) for number in range(20_000)], 0.05)
    assert 900 < len(evaluation) < 1_100


@given(texts, st.integers(1, 70), st.integers(0, 3))
def test_chosen_rows_are_as_many_as_asked_for_and_in_order(
    texts: list[str], limit: int, seed: int
) -> None:
    chosen = choose(keyed(texts), limit, seed).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, len(texts))


@given(texts, st.integers(1, 20))
def test_the_chosen_rows_are_those_with_the_lowest_hash(texts: list[str], limit: int) -> None:
    keys = keyed(texts)
    drawn = [hashlib.sha256(f"3 {name}".encode()).digest() for name in identify(keys)]
    lowest = sorted(range(len(texts)), key=lambda at: drawn[at])[:limit]
    assert choose(keys, limit, seed=3).tolist() == sorted(lowest)


def test_another_seed_chooses_other_rows() -> None:
    rows = keyed([str(number) for number in range(100)])
    assert choose(rows, 10, seed=1).tolist() != choose(rows, 10, seed=2).tolist()


@given(texts)
def test_ids_are_unique_and_of_content_and_count(texts: list[str]) -> None:
    names = list(identify(keyed(texts)))
    assert len(set(names)) == len(names)
    seen: Counter[str] = Counter()
    for text, name in zip(texts, names, strict=True):
        seen[text] += 1
        count = f"-{seen[text]}" if seen[text] > 1 else ""
        assert name == key_of({"text": text}).hex()[:16] + count
    assert count_distinct(keyed(texts)) == len(seen)


@given(texts, texts)
def test_rows_that_are_also_elsewhere_are_counted(one: list[str], other: list[str]) -> None:
    assert count_among(keyed(one), keyed(other)) == sum(text in other for text in one)
    assert count_among(keyed(one), keyed(other)[:0]) == 0


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0\0"])
def test_a_digest_may_end_with_zeros(tail: bytes) -> None:
    """Numpy leaves zeros at the end of a string out when it hands one over."""
    digest = (b"\1" * 16)[: 16 - len(tail)] + tail
    keys = np.frombuffer(digest + b"\2" * 16 + digest, dtype="S16")
    assert list(identify(keys)) == ["01" * 8, "02" * 8, "01" * 8 + "-2"]
    assert hold_out(keys, 0.001).tolist() == [True, False, True]
