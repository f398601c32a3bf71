"""The plan of a training: every row once per epoch, alike rows together, the same for all ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.train.batches import Order, choose_rows, count_steps, count_tokens, every, passes

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=300).map(np.array)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_every_row_comes_once_per_epoch(lengths: np.ndarray, rows: int, epoch: int) -> None:
    order = Order(lengths, rows, seed=1)
    first = epoch * order.steps_per_epoch
    steps = [order.groups(step) for step in range(first, first + order.steps_per_epoch)]
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    assert sorted(map(len, steps))[1:] == [rows] * (len(steps) - 1)


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4))
def test_passes_divide_the_rows_among_ranks(lengths: np.ndarray, rows: int, ranks: int) -> None:
    step = Order(lengths, rows * ranks * 3, seed=1).groups(0)
    groups = passes(step, lengths, rows, ranks)
    shares = [share for group in groups for share in group]
    assert all(len(group) == ranks for group in groups)
    assert max(map(len, shares)) <= rows
    assert sorted(np.concatenate(shares)) == sorted(step)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    one, same, other = (Order(lengths, 8, seed) for seed in (1, 1, 2))
    later = [same.groups(step).tolist() for step in (60, 3)]  # not in sequence
    assert later == [one.groups(60).tolist(), one.groups(3).tolist()]
    assert one.groups(0).tolist() != other.groups(0).tolist()
    assert one.groups(0).tolist() != one.groups(one.steps_per_epoch).tolist()


def test_alike_lengths_stand_together() -> None:
    lengths = np.minimum(np.random.default_rng(0).pareto(1.5, 4000) * 50 + 10, 2048).astype(
        np.int64
    )
    order = Order(lengths, 8, seed=1)
    steps = [order.groups(step) for step in range(order.steps_per_epoch)]
    computed = sum(int(lengths[rows].max()) * len(rows) for rows in steps)
    assert lengths.sum() / computed > 0.8
    # Rows in random order would compute about three times as much.
    assert lengths.sum() / sum(lengths[i : i + 8].max() * 8 for i in range(0, 4000, 8)) < 0.5


def test_tokens_are_counted_over_epochs_and_a_part_of_one() -> None:
    lengths = np.arange(1, 31)
    order = Order(lengths, 4, seed=1)
    steps = 2 * order.steps_per_epoch + 3
    expected = sum(int(lengths[order.groups(step)].sum()) for step in range(steps))
    assert count_tokens(order, steps, lengths) == expected


def test_intervals_and_steps() -> None:
    assert [every(value, 40) for value in (0.25, 0.001, 1, 7)] == [10, 1, 1, 7]
    assert count_steps(2.5, None, 10) == 25
    assert count_steps(2.5, 7, 10) == 7
    assert count_steps(0.01, None, 10) == 1


def test_chosen_rows_are_a_sorted_sample() -> None:
    chosen = choose_rows(100, 10, seed=3)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() == choose_rows(100, 10, seed=3).tolist()
    assert choose_rows(5, 10, seed=3).tolist() == [0, 1, 2, 3, 4]
