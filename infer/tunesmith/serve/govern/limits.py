"""What a key or a group may use, and what it has used so far. Pure: no clock, no input or output.

Every request *reserves* the most that it could use before it starts and *settles* what it did use
when it ends, so that requests which run at the same time cannot spend the same budget twice.
Money is counted in whole nano-USD: sums of fractions would drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

NANO = 10**9
"""Nano-USD in one USD."""

_MINUTE_S = 60
_DAY_S = 86_400


@dataclass(frozen=True)
class Limits:
    """The most that may be used; None is no limit. Days are those of UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    usd_per_day: float | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether a request has to be measured before it starts."""
        found = (self.tokens_per_minute, self.tokens_per_day, self.usd_per_day)
        return any(limit is not None for limit in found)

    def given(self) -> dict[str, float]:
        """The limits that there are, by name."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Use:
    """Tokens and what they cost."""

    tokens: int = 0
    nano_usd: int = 0


@dataclass(frozen=True)
class Refusal:
    """The limit that a request would break."""

    limit: str
    """Its name, as in `Limits`."""

    retry_after_s: int | None
    """When it could pass; None when it never can, however long one waits."""

    is_reserved: bool = False
    """Whether it would pass if the requests that are open now turned out to use nothing."""


class Meter:
    """The use of one key or one group. Times are seconds since the epoch and never fall."""

    def __init__(self, limits: Limits, spent: Use = Use(), day: int = 0) -> None:  # noqa: B008 - frozen
        self.limits = limits
        self.day = day
        """Days since the epoch that `spent` belongs to."""
        self.spent = spent
        """Settled use of that day."""
        self.open = 0
        """Requests that are reserved and not settled."""
        self._reserved = Use()
        self._minute = _Minute()

    def refusal(self, need: Use, now_s: float) -> Refusal | None:
        """Why a request that may use up to `need` cannot start now; None when it can."""
        self._turn(now_s)
        limits, to_midnight_s = self.limits, math.ceil((self.day + 1) * _DAY_S - now_s)
        if limits.concurrent_requests is not None and self.open >= limits.concurrent_requests:
            return Refusal("concurrent_requests", 1)
        for name, amount, limit in (
            ("tokens_per_minute", need.tokens, limits.tokens_per_minute),
            ("requests_per_minute", 1, limits.requests_per_minute),
        ):
            if limit is not None and (wait_s := self._minute.wait_s(name, amount, limit, now_s)):
                return Refusal(name, None if amount > limit else wait_s)
        usd = None if limits.usd_per_day is None else round(limits.usd_per_day * NANO)
        for name, amount, spent, reserved, limit in (
            ("tokens_per_day", need.tokens, self.spent.tokens, self._reserved.tokens,
             limits.tokens_per_day),
            ("usd_per_day", need.nano_usd, self.spent.nano_usd, self._reserved.nano_usd, usd),
        ):  # fmt: skip
            if limit is not None and spent + reserved + amount > limit:
                fits = spent + amount <= limit
                return Refusal(name, None if amount > limit else to_midnight_s, is_reserved=fits)
        return None

    def reserve(self, need: Use, now_s: float) -> Reservation:
        """Count a request that is about to start; `refusal` has let it pass."""
        self._turn(now_s)
        self.open += 1
        self._reserved = _sum(self._reserved, need)
        self._minute.forget(now_s)
        self._minute.add(now_s, requests=1, tokens=need.tokens)
        return Reservation(self, need, now_s)

    def settle(self, reservation: Reservation, used: Use, now_s: float) -> None:
        """Put what was used in place of what was reserved."""
        self._turn(now_s)
        self.open -= 1
        self._reserved = _sum(self._reserved, reservation.need, sign=-1)
        self._minute.add(reservation.at_s, tokens=used.tokens - reservation.need.tokens)
        self.spent = _sum(self.spent, used)

    def _turn(self, now_s: float) -> None:
        """Begin a new day with nothing spent; what is open is still reserved."""
        if (day := int(now_s // _DAY_S)) > self.day:
            self.day, self.spent = day, Use()


@dataclass(frozen=True)
class Reservation:
    """What one open request holds of one meter."""

    meter: Meter
    need: Use
    at_s: float


class _Minute:
    """Requests and tokens of the last sixty seconds, second by second and together."""

    def __init__(self) -> None:
        self._seconds: dict[int, list[int]] = {}
        self._total = [0, 0]
        self._oldest = 0

    def add(self, at_s: float, *, requests: int = 0, tokens: int = 0) -> None:
        second = int(at_s)
        if second < self._oldest:
            return  # a long request settles what counts no more
        for counts in (self._seconds.setdefault(second, [0, 0]), self._total):
            counts[0] += requests
            counts[1] += tokens

    def wait_s(self, name: str, amount: int, limit: int, now_s: float) -> int:
        """Seconds until `amount` more keep to the limit; 0 when they do now."""
        self.forget(now_s)
        column = 0 if name == "requests_per_minute" else 1
        excess = self._total[column] + amount - limit
        if excess <= 0:
            return 0
        for second, counts in self._seconds.items():
            excess -= counts[column]
            if excess <= 0:
                return max(1, second + _MINUTE_S - int(now_s))
        return _MINUTE_S

    def forget(self, now_s: float) -> None:
        """Drop the seconds that are over."""
        oldest = int(now_s) - _MINUTE_S + 1
        if oldest == self._oldest:
            return
        self._oldest = oldest
        while self._seconds and (first := next(iter(self._seconds))) < oldest:
            requests, tokens = self._seconds.pop(first)
            self._total[0] -= requests
            self._total[1] -= tokens


def _sum(one: Use, other: Use, *, sign: int = 1) -> Use:
    return Use(one.tokens + sign * other.tokens, one.nano_usd + sign * other.nano_usd)
