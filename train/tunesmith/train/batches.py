"""Which rows each optimizer step sees, and in which forward pass: pure functions of the seed.

Every rank computes the same plan, so nothing has to be agreed on or remembered: the number of a
step is the position in the data.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.config.schema.train import Train

Rows = NDArray[np.int64]

_STEPS_PER_BUCKET = 64
"""Rows are sorted by length within this many steps: little padding, and still random enough."""


@dataclass(frozen=True)
class Groups:
    """Rows that go through the model together: one, a pair, or a packed block.

    Group g holds `rows[starts[g]:starts[g + 1]]`.
    """

    rows: Rows
    starts: Rows
    lengths: Rows
    """Tokens of each group."""

    @classmethod
    def of(cls, lengths: Rows, rows_per_group: int = 1) -> Groups:
        """Neighbouring rows together."""
        rows = np.arange(len(lengths))
        starts = np.arange(0, len(lengths) + 1, rows_per_group)
        return cls(rows, starts, np.add.reduceat(lengths, starts[:-1]))

    @classmethod
    def packed(cls, lengths: Rows, capacity: int, seed: int) -> Groups:
        """Blocks of at most `capacity` tokens: each is begun with the longest row that is left and
        filled up with the longest that still fit."""
        shuffled = np.random.default_rng(seed).permutation(len(lengths))
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        sizes, firsts = np.unique(lengths[by_length], return_index=True)
        # Rows of one length are a stack, taken from its end.
        left = [int(size) for size in sizes]
        tops = [*(int(first) for first in firsts[1:]), len(lengths)]
        bottoms = [int(first) for first in firsts]
        rows: list[int] = []
        starts = [0]
        while left:
            space = capacity
            while (at := bisect_right(left, space) - 1) >= 0:
                space -= left[at]
                tops[at] -= 1
                rows.append(int(by_length[tops[at]]))
                if tops[at] == bottoms[at]:
                    del left[at], tops[at], bottoms[at]
            assert len(rows) > starts[-1], "a row is longer than a block"
            starts.append(len(rows))
        order, ends = np.array(rows, dtype=np.int64), np.array(starts, dtype=np.int64)
        return cls(order, ends, np.add.reduceat(lengths[order], ends[:-1]))

    @classmethod
    def of_training(cls, lengths: Rows, train: Train, max_length: int, seed: int) -> Groups:
        """As the recipe's `train` section asks for."""
        if train.packing:
            return cls.packed(lengths, max_length, seed)
        return cls.of(lengths, 2 if train.preference else 1)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sums(self, per_row: NDArray[Any]) -> NDArray[Any]:
        """The sum over the rows of each group."""
        return np.add.reduceat(per_row[self.rows], self.starts[:-1])

    def rows_of(self, groups: Rows) -> Rows:
        """The rows of some groups, group after group."""
        if len(groups) == 0:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(
            [self.rows[self.starts[group] : self.starts[group + 1]] for group in groups]
        )


class Order:
    """The groups of each step, in an order that depends on `seed` and the epoch alone."""

    def __init__(self, lengths: Rows, per_step: int, seed: int) -> None:
        self._lengths, self._per_step, self._seed = lengths, per_step, seed
        self.steps_per_epoch = -(-len(lengths) // per_step)
        self._epoch = lru_cache(maxsize=1)(self._plan_epoch)

    def groups(self, step: int) -> Rows:
        """Groups of one step, counted from 0 over all epochs; the last of an epoch may be short."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def _plan_epoch(self, epoch: int) -> list[Rows]:
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self._lengths))
        steps: list[Rows] = []
        for bucket in _slices(shuffled, self._per_step * _STEPS_PER_BUCKET):
            by_length = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            steps += _slices(by_length, self._per_step)
        return [steps[at] for at in random.permutation(len(steps))]


def passes(groups: Rows, lengths: Rows, per_pass: int, ranks: int) -> list[list[Rows]]:
    """The forward passes of one step: for each pass, the groups of each rank.

    Groups of like length stand together. All ranks make the same number of passes, so a rank's
    share can be empty.
    """
    by_length = groups[np.argsort(-lengths[groups], kind="stable")]
    return [
        [share[rank::ranks] for rank in range(ranks)]
        for share in _slices(by_length, per_pass * ranks)
    ]


def count_steps(epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole training."""
    return max_steps or max(1, round(epochs * steps_per_epoch))


def count_tokens(order: Order, steps: int, per_group: NDArray[Any]) -> int:
    """The sum of `per_group` over all groups that `steps` steps see."""
    epochs, rest = divmod(steps, order.steps_per_epoch)
    partial = (int(per_group[order.groups(step)].sum()) for step in range(steps - rest, steps))
    return epochs * int(per_group.sum()) + sum(partial)


def every(value: float, total: int) -> int:
    """An interval in steps, from one in steps or (below 1) as a share of all steps."""
    return max(1, round(value * total)) if value < 1 else int(value)


def choose_rows(count: int, limit: int, seed: int) -> Rows:
    """`limit` of `count` rows, the same ones for a seed."""
    chosen = np.random.default_rng(seed).permutation(count)[:limit]
    return np.sort(chosen)


def _slices(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
