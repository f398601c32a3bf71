"""Percentile bootstrap over rows or requests. Pure functions; the same seed gives the same result.

Shape suffixes: N samples, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_BLOCK = 1_000_000  # indices drawn at a time: 8 MB whatever N is

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def percentile(
    samples: Sequence[float], percent: float, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The given percentile of independent samples, between neighbours by linear interpolation."""
    values_N = _column(samples, "samples")

    def statistic(indices_RN: Indices) -> Floats:
        return np.asarray(np.percentile(values_N[indices_RN], percent, axis=1))

    return _interval(statistic, len(values_N), confidence, seed)


def ratio_of_sums(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Σ numerators / Σ denominators over rows, such as nats per token; all 1 below gives a mean."""
    top_N, bottom_N = _column(numerators, "numerators"), _column(denominators, "denominators")
    _same_length(top_N, bottom_N)

    def statistic(indices_RN: Indices) -> Floats:
        return np.asarray(top_N[indices_RN].sum(axis=1) / bottom_N[indices_RN].sum(axis=1))

    return _interval(statistic, len(top_N), confidence, seed)


def paired_relative_difference(
    numerators: Sequence[float],
    denominators: Sequence[float],
    reference_numerators: Sequence[float],
    reference_denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How far one ratio of sums is from another's, relative to it (0.01 is 1 % above).

    Row i of both belongs together and is drawn together: what makes a row hard for both models
    cancels, which is why this interval is far narrower than the two intervals side by side.
    """
    columns = [
        _column(numerators, "numerators"),
        _column(denominators, "denominators"),
        _column(reference_numerators, "reference numerators"),
        _column(reference_denominators, "reference denominators"),
    ]
    _same_length(*columns)

    def statistic(indices_RN: Indices) -> Floats:
        top, bottom, reference_top, reference_bottom = (
            column_N[indices_RN].sum(axis=1) for column_N in columns
        )
        return np.asarray(top / bottom / (reference_top / reference_bottom) - 1.0)

    return _interval(statistic, len(columns[0]), confidence, seed)


def _interval(
    statistic: Callable[[Indices], Floats], count: int, confidence: float, seed: int
) -> Interval:
    """The statistic of all rows, and the bounds that hold the middle of its resampled values."""
    random = np.random.default_rng(seed)
    per_block = max(1, _BLOCK // count)
    resampled_R = np.concatenate(
        [
            statistic(random.integers(0, count, size=(min(per_block, RESAMPLES - start), count)))
            for start in range(0, RESAMPLES, per_block)
        ]
    )
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(resampled_R, [tail, 1.0 - tail])
    value = statistic(np.arange(count)[np.newaxis])[0]
    return Interval(float(value), float(low), float(high))


def _column(values: Sequence[float], name: str) -> Floats:
    column_N: Floats = np.asarray(values, dtype=np.float64)
    if column_N.ndim != 1 or not len(column_N):
        raise ValueError(f"{name}: a non-empty list of numbers is needed")
    if not np.isfinite(column_N).all():
        raise ValueError(f"{name}: every number must be finite")
    return column_N


def _same_length(*columns: npt.NDArray[Any]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns of {[len(column) for column in columns]} rows cannot be paired")
