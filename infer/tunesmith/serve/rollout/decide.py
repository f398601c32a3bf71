"""Whether a rollout goes on, is held or is taken back, from what both arms have done. Pure.

The same evidence always gives the same decision, so that a recorded one can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tunesmith.config.schema.routes import Rollout
from tunesmith.serve.rollout.sequential import Bounds, difference, proportion

Action = Literal["hold", "advance", "complete", "roll back", "promote", "abort"]
"""The last two are a person's."""

_EVEN = 0.5
_SIGNALS_PER_STEP = 3


@dataclass(frozen=True)
class Plan:
    """What a rollout was started with."""

    shares: tuple[float, ...]
    """Of the route, one for each step; the last is 1."""

    min_requests: int
    false_rollbacks: float
    error_tolerance: float
    latency_tolerance: float | None
    cost_tolerance: float | None
    quality_tolerance: float
    probes: int
    """Questions of the probe set; 0 where there is none."""

    @classmethod
    def of(cls, section: Rollout, probes: int) -> Plan:
        """As the recipe has it."""
        return cls(
            tuple(percent / 100 for percent in section.steps_percent),
            section.min_requests,
            section.false_rollbacks,
            section.error_tolerance,
            section.latency_tolerance,
            section.cost_tolerance,
            section.quality_tolerance,
            probes,
        )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Plan:
        """From its record."""
        return cls(**{**fields, "shares": tuple(fields["shares"])})

    @property
    def alpha(self) -> float:
        """The share of `false_rollbacks` that each look-out may spend: errors, latency and cost in
        every step that has two arms, and quality once."""
        return self.false_rollbacks / (_SIGNALS_PER_STEP * max(1, len(self.shares) - 1) + 1)


@dataclass
class Evidence:
    """Counts: those of the step that is on, and those of the probes since the start.

    A step's own requests alone decide it. Both arms are compared under the same load and at the
    same time, so that what changes with the hour is not taken for the new arm's doing.
    """

    requests: int = 0
    errors: int = 0
    baseline_requests: int = 0
    baseline_errors: int = 0
    timed_pairs: int = 0
    slower: int = 0
    """Pairs of answers, one of each arm and close in time, of which the new arm's took longer by
    more than the tolerance. No distribution is assumed, and an outlier is one pair."""

    priced_pairs: int = 0
    dearer: int = 0
    probes: int = 0
    lost: int = 0
    """Probes that the baseline passes and the new arm does not."""

    won: int = 0

    def next_step(self) -> Evidence:
        """Everything anew but the probes."""
        return Evidence(probes=self.probes, lost=self.lost, won=self.won)


@dataclass(frozen=True)
class Decision:
    """What to do, and the figures that say so."""

    action: Action
    reason: str
    signals: dict[str, dict[str, float]] = field(default_factory=dict)
    """`low`, `high` and the limits for going back and for going on, of each signal."""

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def decide(plan: Plan, step: int, evidence: Evidence) -> Decision:
    """Back where one signal is surely worse than its tolerance; on where every signal is surely
    within it; held while the evidence says neither.

    How sure "within" has to be grows with what the next step lets happen: the harm that it could
    do to the route's requests as a whole stays below the tolerance.
    """
    next_share = plan.shares[step + 1] if step + 1 < len(plan.shares) else 1.0
    signals = _signals(plan, evidence, next_share)
    is_enough = min(evidence.requests, evidence.baseline_requests) >= plan.min_requests
    worse = [
        name
        for name, one in signals.items()
        if one["low"] > one["back_above"] and (is_enough or name == "quality")
    ]
    if worse:
        return Decision("roll back", f"worse: {', '.join(worse)}", signals)
    if not is_enough:
        return Decision("hold", f"fewer than {plan.min_requests} requests to each arm", signals)
    if evidence.probes < plan.probes:
        return Decision("hold", "the probes are not through", signals)
    unsure = [name for name, one in signals.items() if one["high"] > one["on_below"]]
    if unsure:
        return Decision("hold", f"not sure yet: {', '.join(unsure)}", signals)
    is_last = step + 2 >= len(plan.shares)
    return Decision("complete" if is_last else "advance", "within all tolerances", signals)


def _signals(plan: Plan, evidence: Evidence, next_share: float) -> dict[str, dict[str, float]]:
    alpha = plan.alpha
    found = {
        "errors": _signal(
            difference(
                evidence.errors,
                evidence.requests,
                evidence.baseline_errors,
                evidence.baseline_requests,
                alpha,
            ),
            plan.error_tolerance,
            min(1.0, plan.error_tolerance / next_share),
        )
    }
    # More often than not over the tolerance is worse; at a small share "not always" will do.
    on_below = 1.0 - (1.0 - _EVEN) * next_share
    if plan.latency_tolerance is not None:
        bounds = proportion(evidence.slower, evidence.timed_pairs, alpha)
        found["latency"] = _signal(bounds, _EVEN, on_below)
    if plan.cost_tolerance is not None and evidence.priced_pairs:
        bounds = proportion(evidence.dearer, evidence.priced_pairs, alpha)
        found["cost"] = _signal(bounds, _EVEN, on_below)
    if plan.probes:
        bounds = difference(evidence.lost, evidence.probes, evidence.won, evidence.probes, alpha)
        if evidence.probes >= plan.probes:
            # Every question of the set was asked: what it says is known, not estimated.
            seen = (evidence.lost - evidence.won) / evidence.probes
            bounds = Bounds(bounds.low, seen)
        found["quality"] = _signal(bounds, plan.quality_tolerance, plan.quality_tolerance)
    return found


def _signal(bounds: Bounds, back_above: float, on_below: float) -> dict[str, float]:
    return {
        "low": round(bounds.low, 6),
        "high": round(bounds.high, 6),
        "back_above": round(back_above, 6),
        "on_below": round(on_below, 6),
    }
