"""Quality of a variant from the rows of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.statistics import Interval, paired_relative_difference, ratio_of_sums

Rows = Sequence[Mapping[str, Any]]

_FIELDS = {"completion_loss": "completion_loss_sum_nats", "chrf": "chrf"}


@dataclass(frozen=True)
class Change:
    """The loss of one variant against another's, paired row by row."""

    against: str
    relative: Interval
    """0.01 is a loss that is 1 % higher."""

    @property
    def excludes_zero(self) -> bool:
        return self.relative.low > 0 or self.relative.high < 0


def level(rows: Rows, metric: str, confidence: float, seed: int) -> Interval | None:
    """One metric with its interval; None where no row has it."""
    found = [row for row in rows if row.get(_FIELDS[metric]) is not None]
    if not found:
        return None
    return ratio_of_sums(*_columns(found, metric), confidence=confidence, seed=seed)


def loss_change(
    rows: Rows, others: Rows, against: str, confidence: float, seed: int
) -> Change | None:
    """How the loss differs over the rows that both have; None where nothing can be compared."""
    field = _FIELDS["completion_loss"]
    by_id = {row["id"]: row for row in others if row.get(field) is not None}
    left = [row for row in rows if row.get(field) is not None and row["id"] in by_id]
    right = [by_id[row["id"]] for row in left]
    if not left:
        return None
    values, tokens = _columns(left, "completion_loss")
    other_values, other_tokens = _columns(right, "completion_loss")
    if tokens != other_tokens:  # other tokenizers: losses per token of different texts
        return None
    relative = paired_relative_difference(
        values, tokens, other_values, other_tokens, confidence=confidence, seed=seed
    )
    return Change(against, relative)


def _columns(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """What is summed, and the weights: learnt tokens for the loss, 1 for a score."""
    values = [float(row[_FIELDS[metric]]) for row in rows]
    if metric == "completion_loss":
        return values, [float(row["completion_tokens"]) for row in rows]
    return values, [1.0] * len(rows)
