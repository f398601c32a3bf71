"""Percentile bootstrap over rows or requests. Pure functions; the same seed gives the same result.

Shape suffixes: N samples, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
RESAMPLES_OF_CLUSTERS = 500  # each goes over all values
_BLOCK = 1_000_000  # indices drawn at a time: 8 MB whatever N is

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def percentile(
    samples: Sequence[float],
    percent: float,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    block: int = 1,
) -> Interval:
    """The given percentile of samples, between neighbours by linear interpolation.

    Samples that depend on those before them, such as waiting times in a queue, are drawn in runs
    of `block` neighbours: drawn one by one they would seem to say more than they do.
    """
    values_N = _column(samples, "samples")

    def statistic(indices_RN: Indices) -> Floats:
        return np.asarray(np.percentile(values_N[indices_RN], percent, axis=1))

    return _interval(statistic, len(values_N), confidence, seed, block)


def clustered_percentiles(
    clusters: Sequence[Sequence[float]],
    percents: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Percentiles of all values together, where whole clusters are drawn and not single values,
    such as the gaps between the tokens of one answer. The percentile is a value that occurs."""
    values_V = _column([value for cluster in clusters for value in cluster], "clusters")
    owners_V = np.repeat(np.arange(len(clusters)), [len(cluster) for cluster in clusters])
    order_V = np.argsort(values_V, kind="stable")
    sorted_V, owners_V = values_V[order_V], owners_V[order_V]
    shares = np.asarray(percents) / 100

    def at(counts_N: Floats) -> Floats:
        weights_V = np.cumsum(counts_N[owners_V])
        places = np.searchsorted(weights_V, shares * weights_V[-1])
        return np.asarray(sorted_V[np.minimum(places, len(sorted_V) - 1)])

    random, count = np.random.default_rng(seed), len(clusters)
    drawn_RP = np.stack(
        [
            at(np.bincount(random.integers(0, count, size=count), minlength=count).astype(float))
            for _ in range(RESAMPLES_OF_CLUSTERS)
        ]
    )
    tail = (1.0 - confidence) / 2
    bounds = np.quantile(drawn_RP, [tail, 1.0 - tail], axis=0)
    found = at(np.ones(count))
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(found, *bounds, strict=True)]


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
    statistic: Callable[[Indices], Floats],
    count: int,
    confidence: float,
    seed: int,
    block: int = 1,
) -> Interval:
    """The statistic of all rows, and the bounds that hold the middle of its resampled values."""
    random = np.random.default_rng(seed)
    per_block = max(1, _BLOCK // count)
    resampled_R = np.concatenate(
        [
            statistic(_draw(random, min(per_block, RESAMPLES - start), count, block))
            for start in range(0, RESAMPLES, per_block)
        ]
    )
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(resampled_R, [tail, 1.0 - tail])
    value = statistic(np.arange(count)[np.newaxis])[0]
    return Interval(float(value), float(low), float(high))


def _draw(random: np.random.Generator, resamples: int, count: int, block: int) -> Indices:
    """Indices of resamples: runs of `block` neighbours, which go on at the start after the end."""
    if block <= 1:
        return random.integers(0, count, size=(resamples, count))
    starts = random.integers(0, count, size=(resamples, -(-count // block)))
    runs = starts[:, :, np.newaxis] + np.arange(block)
    return np.asarray(runs.reshape(resamples, -1)[:, :count] % count)


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
