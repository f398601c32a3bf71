"""Figures with their uncertainty: bootstrap intervals, and models compared on the same rows."""

from tunesmith.statistics.bootstrap import (
    Interval,
    clustered_percentiles,
    paired_relative_difference,
    percentile,
    ratio_of_sums,
)
from tunesmith.statistics.paired import MIN_ROWS, Comparison, Rows, compare, level

__all__ = [
    "MIN_ROWS",
    "Comparison",
    "Interval",
    "Rows",
    "clustered_percentiles",
    "compare",
    "level",
    "paired_relative_difference",
    "percentile",
    "ratio_of_sums",
]
