"""Figures with their uncertainty: bootstrap intervals of percentiles, ratios and differences."""

from tunesmith.statistics.bootstrap import (
    Interval,
    paired_relative_difference,
    percentile,
    ratio_of_sums,
)

__all__ = ["Interval", "paired_relative_difference", "percentile", "ratio_of_sums"]
