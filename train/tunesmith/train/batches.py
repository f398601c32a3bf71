"""Which rows each optimizer step sees, and in which forward pass: pure functions of the seed.

Every rank computes the same plan, so nothing has to be agreed on or remembered: the number of a
step is the position in the data.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_STEPS_PER_BUCKET = 64
"""Rows are sorted by length within this many steps: little padding, and still random enough."""


class Order:
    """The rows of each step, in an order that depends on `seed` and the epoch alone."""

    def __init__(self, lengths: Rows, rows_per_step: int, seed: int) -> None:
        self._lengths, self._rows_per_step, self._seed = lengths, rows_per_step, seed
        self.steps_per_epoch = -(-len(lengths) // rows_per_step)
        self._epoch = lru_cache(maxsize=1)(self._plan_epoch)

    def rows(self, step: int) -> Rows:
        """Rows of one step, counted from 0 over all epochs; the last of an epoch may be short."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def _plan_epoch(self, epoch: int) -> list[Rows]:
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self._lengths))
        steps: list[Rows] = []
        for bucket in _slices(shuffled, self._rows_per_step * _STEPS_PER_BUCKET):
            by_length = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            steps += _slices(by_length, self._rows_per_step)
        return [steps[at] for at in random.permutation(len(steps))]


def passes(rows: Rows, lengths: Rows, rows_per_pass: int, ranks: int) -> list[list[Rows]]:
    """The forward passes of one step: for each pass, the rows of each rank.

    Rows of like length stand together. All ranks make the same number of passes, so a rank's share
    can be empty.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    return [
        [share[rank::ranks] for rank in range(ranks)]
        for share in _slices(by_length, rows_per_pass * ranks)
    ]


def count_steps(epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole training."""
    return max_steps or max(1, round(epochs * steps_per_epoch))


def count_tokens(order: Order, steps: int, per_row: Rows) -> int:
    """The sum of `per_row` over all rows that `steps` steps see."""
    epochs, rest = divmod(steps, order.steps_per_epoch)
    partial = (int(per_row[order.rows(step)].sum()) for step in range(steps - rest, steps))
    return epochs * int(per_row.sum()) + sum(partial)


def every(value: float, total: int) -> int:
    """An interval in steps, from one in steps or (below 1) as a share of all steps."""
    return max(1, round(value * total)) if value < 1 else int(value)


def choose_rows(count: int, limit: int, seed: int) -> Rows:
    """`limit` of `count` rows, the same ones for a seed."""
    chosen = np.random.default_rng(seed).permutation(count)[:limit]
    return np.sort(chosen)


def _slices(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
