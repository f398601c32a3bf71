"""What is held out depends on content alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.split import Keyed, choose, hold_out, identify

texts = st.lists(st.text(max_size=3), min_size=1, max_size=60)
fractions = st.floats(0.01, 0.99)


def keyed(texts: list[str]) -> list[Keyed]:
    return [Keyed.of({"text": text}) for text in texts]


def ids(rows: list[Keyed]) -> Counter[str]:
    return Counter(identify(rows))


@given(texts, fractions, st.randoms())
def test_the_order_of_rows_changes_nothing(
    texts: list[str], fraction: float, random: object
) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for one, other in zip(
        hold_out(keyed(texts), fraction), hold_out(keyed(shuffled), fraction), strict=True
    ):
        assert ids(one) == ids(other)
        assert ids(choose(one, 5, seed=1)) == ids(choose(other, 5, seed=1))


@given(texts, fractions)
def test_equal_rows_are_on_one_side_and_none_is_lost(texts: list[str], fraction: float) -> None:
    train, evaluation = hold_out(keyed(texts), fraction)
    assert not {row.key for row in train} & {row.key for row in evaluation}
    assert len(train) + len(evaluation) == len(texts)
    if len(set(texts)) > 1:
        assert train
        assert evaluation


@given(texts, st.text(max_size=3))
def test_another_row_moves_no_row(texts: list[str], text: str) -> None:
    # Enough rows that some fall on either side of the bound by themselves.
    rows = [str(number) for number in range(200)] + texts
    before, _ = hold_out(keyed(rows), 0.5)
    after, _ = hold_out(keyed([*rows, text]), 0.5)
    assert {row.key for row in before} <= {row.key for row in after}


def test_the_share_is_kept() -> None:
    _, evaluation = hold_out(keyed([str(number) for number in range(20_000)]), 0.05)
    assert 900 < len(evaluation) < 1_100


@given(texts, st.integers(1, 70), st.integers(0, 3))
def test_chosen_rows_are_as_many_as_asked_for_and_in_order(
    texts: list[str], limit: int, seed: int
) -> None:
    rows = keyed(texts)
    chosen = choose(rows, limit, seed)
    assert len(chosen) == min(limit, len(rows))
    places = iter(rows)
    assert all(any(row is other for other in places) for row in chosen)


def test_another_seed_chooses_other_rows() -> None:
    rows = keyed([str(number) for number in range(100)])
    assert choose(rows, 10, seed=1) != choose(rows, 10, seed=2)


@given(texts)
def test_ids_are_unique(texts: list[str]) -> None:
    names = identify(keyed(texts))
    assert len(set(names)) == len(names)
