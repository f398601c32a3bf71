"""Confidence sequences for proportions: intervals that hold at all moments at once. Pure.

A rollout is looked at every second for as long as it lasts. Ordinary tests and intervals hold for
one look that was planned; looked at again and again they all "find" a difference some day. A
confidence sequence contains the truth at every look together with the given probability, so one
may stop, go on, or decide whenever one likes.

For k successes in n trials with the unknown proportion p, the likelihood of the trials under a
Beta(1/2, 1/2) mixture, divided by that under p itself, is a martingale that begins at 1. By Ville's
inequality it ever reaches 1/alpha with a probability of at most alpha, so all p for which it has
not yet are a confidence sequence: Robbins, "Statistical methods related to the law of the iterated
logarithm", Ann. Math. Statist. 41 (1970); as the beta-binomial mixture in Howard, Ramdas, McAuliffe
and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist. 49
(2021). The values of p it leaves out are those that the mixture sequential probability ratio test
rejects, with always-valid p-values: Johari, Koomen, Pekelis and Walsh, "Always valid inference:
continuous monitoring of A/B tests", Operations Research 70 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_A = _B = 0.5
_STEPS = 50
"""Halvings of the interval when a bound is sought."""


class Bounds(NamedTuple):
    """What the truth lies between."""

    low: float
    high: float


def proportion(successes: int, trials: int, alpha: float) -> Bounds:
    """Where the proportion lies, at every look with a probability of at least 1 - alpha."""
    if not trials:
        return Bounds(0.0, 1.0)
    limit = math.log(1 / alpha)
    mixture = _log_beta(successes + _A, trials - successes + _B) - _log_beta(_A, _B)
    found = successes / trials

    def is_out(p: float) -> bool:
        return mixture - _log_likelihood(successes, trials, p) >= limit

    return Bounds(
        0.0 if not is_out(0.0) else _edge(0.0, found, is_out),
        1.0 if not is_out(1.0) else _edge(1.0, found, is_out),
    )


def difference(
    successes: int, trials: int, other_successes: int, other_trials: int, alpha: float
) -> Bounds:
    """Where one proportion less another lies, each with half of alpha."""
    one = proportion(successes, trials, alpha / 2)
    other = proportion(other_successes, other_trials, alpha / 2)
    return Bounds(one.low - other.high, one.high - other.low)


def _edge(outside: float, inside: float, is_out: Callable[[float], bool]) -> float:
    for _ in range(_STEPS):
        middle = (outside + inside) / 2
        if is_out(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _log_likelihood(successes: int, trials: int, p: float) -> float:
    failures = trials - successes
    if (p == 0.0 and successes) or (p == 1.0 and failures):
        return -math.inf
    found = successes * math.log(p) if successes else 0.0
    return found + (failures * math.log1p(-p) if failures else 0.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
