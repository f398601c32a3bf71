"""Two models on the same rows: how far apart they are, and whether the rows can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config import TunesmithError
from tunesmith.statistics.bootstrap import Interval, paired_relative_difference, ratio_of_sums

METRICS = {
    "completion_loss": "completion_loss_sum_nats",
    "chrf": "chrf",
    "rouge_l": "rouge_l",
}
"""Each metric and the field of a row it is summed from; a row weighs its learnt tokens for the
loss, and 1 for the others."""

MIN_ROWS = 10
"""Below this, resampling the rows says nothing about the rows one did not see."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """One metric of a model against another, paired row by row."""

    metric: str
    rows: int
    difference: Interval
    """In the metric's own unit: nats per token, or points."""

    relative: Interval | None
    """For the loss, 0.01 where it is 1 % above the other model's; None for the text metrics, which
    can be 0."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the rows show a difference: there are enough of them for an interval to mean
        something, and it leaves out 0."""
        low, high = self.difference.low, self.difference.high
        return self.rows >= MIN_ROWS and (low > 0 or high < 0)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "difference": self.difference._asdict(),
            "relative_percent": _percent(self.relative)._asdict() if self.relative else None,
            "excludes_zero": self.excludes_zero,
        }


def level(rows: Rows, metric: str, confidence: float, seed: int) -> Interval | None:
    """One metric of one model with its interval; None where no row has it."""
    found = [row for row in rows if row.get(METRICS[metric]) is not None]
    if not found:
        return None
    values, weights = _columns(found, metric)
    return ratio_of_sums(values, weights, confidence=confidence, seed=seed)


def compare(
    rows: Rows, others: Rows, metric: str, confidence: float, seed: int
) -> Comparison | None:
    """`rows` minus `others` over the rows that both have; None where there are none.

    Raises TunesmithError when a row has other tokens for the two, which would compare losses of
    different texts.
    """
    key = METRICS[metric]
    by_id = {row["id"]: row for row in others if row.get(key) is not None}
    left = [row for row in rows if row.get(key) is not None and row["id"] in by_id]
    right = [by_id[row["id"]] for row in left]
    if not left:
        return None
    (values, weights), (other_values, other_weights) = (
        _columns(left, metric),
        _columns(right, metric),
    )
    if weights != other_weights:
        raise TunesmithError(
            "the two models tokenise the same rows differently, so their losses per token cannot "
            "be compared; evaluate models that share a tokenizer and a chat template"
        )
    differences = [value - other for value, other in zip(values, other_values, strict=True)]
    relative = None
    if metric == "completion_loss":
        relative = paired_relative_difference(
            values, weights, other_values, weights, confidence=confidence, seed=seed
        )
    return Comparison(
        metric=metric,
        rows=len(left),
        difference=ratio_of_sums(differences, weights, confidence=confidence, seed=seed),
        relative=relative,
    )


def _percent(share: Interval) -> Interval:
    return Interval(*(100 * bound for bound in share))


def _columns(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """Sums and weights of the rows."""
    values = [float(row[METRICS[metric]]) for row in rows]
    if metric == "completion_loss":
        return values, [float(row["completion_tokens"]) for row in rows]
    return values, [1.0] * len(rows)
