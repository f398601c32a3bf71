"""Admits requests: all limits of a key and of its group hold at once, or nothing is reserved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.serve.govern.limits import Limits, Meter, Refusal, Reservation, Use

Subject = tuple[str, str]
"""`("key", id)` or `("group", name)`."""


class RefusedError(Exception):
    """A limit is reached."""

    def __init__(self, subject: Subject, refusal: Refusal) -> None:
        super().__init__(refusal.limit)
        self.subject, self.refusal = subject, refusal


@dataclass(frozen=True)
class Grant:
    """What an admitted request holds until it is settled, which it has to be exactly once."""

    need: Use
    parts: tuple[Reservation, ...]


class Governor:
    """Lives on one event loop; a check and its reservation are one step there.

    A request that fails only because of what open requests have reserved, and may not use, waits
    for them to settle. So a budget is neither overspent nor left unused because estimates were
    high.
    """

    def __init__(self, spent: Mapping[Subject, Use], day: int, *, longest_wait_s: float) -> None:
        self._meters: dict[Subject, Meter] = {}
        self._recovered, self._recovered_day = spent, day
        self._longest_wait_s = longest_wait_s
        self._settled = asyncio.Event()
        self._waiting = 0

    def meter(self, subject: Subject, limits: Limits) -> Meter:
        """The meter of a subject, under the limits that it has now."""
        if subject not in self._meters:
            spent = self._recovered.get(subject, Use())
            self._meters[subject] = Meter(limits, spent, self._recovered_day)
        found = self._meters[subject]
        found.limits = limits
        return found

    async def admit(self, subjects: Mapping[Subject, Limits], need: Use) -> Grant:
        """Reserve `need` from every subject. Raises RefusedError for the first that has no room."""
        deadline_s = time.monotonic() + self._longest_wait_s
        while True:
            now_s = time.time()
            meters = {subject: self.meter(subject, one) for subject, one in subjects.items()}
            refused = {
                subject: found
                for subject, meter in meters.items()
                if (found := meter.refusal(need, now_s))
            }
            if not refused:
                parts = tuple(meter.reserve(need, now_s) for meter in meters.values())
                return Grant(need, parts)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not all(found.is_reserved for found in refused.values()):
                final = [item for item in refused.items() if not item[1].is_reserved]
                raise RefusedError(*(final or list(refused.items()))[0])
            self._waiting += 1
            try:
                await asyncio.wait_for(self._settled.wait(), left_s)
            except TimeoutError:
                continue
            finally:
                self._waiting -= 1

    def settle(self, grant: Grant, used: Use) -> None:
        """Give back what a request held, and count what it used."""
        for part in grant.parts:
            part.meter.settle(part, used, time.time())
        if self._waiting:
            self._settled.set()
            self._settled = asyncio.Event()
