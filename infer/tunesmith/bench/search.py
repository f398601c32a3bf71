"""Which rate to try next: the highest that keeps a promise, found in few measurements. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

_STEP = 1.5  # upwards, as long as nothing breaks the promise
_LEAST = 1 / 64  # of the first rate; below it nothing is looked for


def next_rate(kept: Mapping[float, bool], start: float, tolerance: float) -> float | None:
    """The rate to measure next, given which ones kept the promise; None when it is found.

    A rate above one that broke the promise counts for nothing: by chance some keep it.
    """
    if not kept:
        return start
    low, high = bracket(kept)
    if high is None:
        assert low is not None  # one of the two is known
        return low * _STEP
    if low is None:
        return high / 2 if high / 2 >= start * _LEAST else None
    return None if high <= low * (1 + tolerance) else math.sqrt(low * high)


def bracket(kept: Mapping[float, bool]) -> tuple[float | None, float | None]:
    """The highest rate that keeps the promise, and the lowest that breaks it."""
    high = min((rate for rate, good in kept.items() if not good), default=None)
    low = max(
        (rate for rate, good in kept.items() if good and (high is None or rate < high)),
        default=None,
    )
    return low, high
