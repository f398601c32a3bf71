"""Two measurements of rounds: how far apart they are, and whether that is shown. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import mean, median, variance

from tunesmith.statistics.bootstrap import Interval

ENOUGH_ROUNDS = 3
"""From so many rounds on their spread says something; of two, Student's interval is twelve times as
wide."""

_ENOUGH_TO_RANK = 6
_NORMAL = 1.96
# Student's t for 95 %, by degrees of freedom; beyond the last the normal's is near enough.
_STUDENT = {
    1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23,
    12: 2.18, 14: 2.14, 16: 2.12, 18: 2.10, 20: 2.09, 30: 2.04,
}  # fmt: skip


def relative_difference(
    level: Interval,
    other: Interval,
    rounds: Sequence[float] = (),
    other_rounds: Sequence[float] = (),
) -> Interval:
    """How far `level` is above `other`, relative to it (0.01 is 1 %), with a 95 % interval.

    The interval is the wider of two: that of resampling within the runs, and that of how far
    repeated rounds of each lie apart. Either alone can be narrow by luck: rounds in a row know
    little of what the machine does an hour later.
    """
    if min(level.value, other.value) <= 0:
        raise ValueError("relative to nothing, or less, there is no difference")
    ratio = math.log(level.value / other.value)
    within = _NORMAL * math.hypot(_log_error(level), _log_error(other))
    half = max(within, _between(rounds, other_rounds))
    return Interval(*(math.expm1(at) for at in (ratio, ratio - half, ratio + half)))


def difference_in_turns(rounds: Sequence[float], other_rounds: Sequence[float]) -> Interval:
    """How far `rounds` are above `other_rounds`, relative to them, where each was measured right
    before or after the other's of its place: what the machine did then is in both. 95 %, of the
    logarithms of their ratios.

    From six pairs on it is that of their signed ranks (Hodges and Lehmann, 1963): a pair within
    which the machine did something else hardly moves it. Of fewer it is Student's.
    """
    pairs = zip(rounds, other_rounds, strict=True)
    logs = [math.log(one / other) for one, other in pairs]
    if len(logs) < _ENOUGH_TO_RANK:
        middle = mean(logs)
        half = _student(len(logs) - 1) * math.sqrt(variance(logs) / len(logs))
        return Interval(*(math.expm1(at) for at in (middle, middle - half, middle + half)))
    means = sorted((one + other) / 2 for at, one in enumerate(logs) for other in logs[at:])
    outside = _means_outside(len(logs))
    edges = (median(means), means[outside], means[-1 - outside])
    return Interval(*(math.expm1(at) for at in edges))


@functools.cache
def _means_outside(pairs: int) -> int:
    """How many of the means of two are below a 95 % interval, and as many above: the largest sum of
    signed ranks that, or less, comes by chance once in forty times at most."""
    ways = [1]
    """In how many ways ranks can have each sum."""
    for rank in range(1, pairs + 1):
        ways = [
            (ways[total] if total < len(ways) else 0) + (ways[total - rank] if total >= rank else 0)
            for total in range(len(ways) + rank)
        ]
    below = accumulate(ways)
    return next(total for total, count in enumerate(below) if 40 * count > 2**pairs) - 1


def with_rounds(level: Interval, rounds: Sequence[float]) -> Interval:
    """The interval of a run, or that of its rounds where it is wider and there are enough."""
    if level.value <= 0 or len(rounds) < ENOUGH_ROUNDS or min(rounds) <= 0:
        return level
    logs = [math.log(value) for value in rounds]
    factor = math.exp(_student(len(logs) - 1) * math.sqrt(variance(logs) / len(logs)))
    return Interval(
        level.value, min(level.low, level.value / factor), max(level.high, level.value * factor)
    )


def _log_error(level: Interval) -> float:
    """The standard error of the logarithm, from a 95 % interval."""
    low = max(level.low, level.value * 1e-3)
    return math.log(max(level.high, low) / low) / (2 * _NORMAL)


def _between(rounds: Sequence[float], other_rounds: Sequence[float]) -> float:
    """Half an interval from the spread of rounds; 0 where there is one of each."""
    columns = [[math.log(level) for level in column] for column in (rounds, other_rounds)]
    freedom = sum(max(0, len(column) - 1) for column in columns)
    if not freedom or not all(columns):
        return 0.0
    squares = sum(variance(column) * (len(column) - 1) for column in columns if len(column) > 1)
    error = math.sqrt(squares / freedom * sum(1 / len(column) for column in columns))
    return error * _student(freedom)


def _student(freedom: int) -> float:
    known = [degrees for degrees in _STUDENT if degrees <= freedom]
    return _STUDENT[known[-1]] if freedom <= max(_STUDENT) else _NORMAL
