"""Where the time of an engine went, and whose it was. Pure: seconds and a price in, USD out.

Each moment in which requests are in flight is shared equally between them; the rest is loading,
idling, and what lies between the loads. So the costs of all requests, idle time and loading add up
to what is paid for: wall hours times the price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.bench.client import Sample


@dataclass(frozen=True)
class Line:
    """One line of a bill."""

    name: str
    seconds: float
    usd: float | None


def usd_of(hour_usd: float | None, seconds: float) -> float | None:
    """What a time costs; None without a price."""
    return None if hour_usd is None else hour_usd * seconds / 3600


def shares_s(samples: Sequence[Sample]) -> list[float]:
    """Seconds of the machine that each request is charged with, in the order of `samples`."""
    moments = sorted(
        [(sample.sent_s, 1, place) for place, sample in enumerate(samples)]
        + [(sample.ended_s, -1, place) for place, sample in enumerate(samples)],
        key=lambda moment: (moment[0], -moment[1]),
    )
    charged = [0.0] * len(samples)
    open_requests, per_request_s, before_s = 0, 0.0, 0.0
    began_s = [0.0] * len(samples)
    for moment_s, change, place in moments:
        if open_requests:
            per_request_s += (moment_s - before_s) / open_requests
        if change == 1:
            began_s[place] = per_request_s
        else:
            charged[place] = per_request_s - began_s[place]
        open_requests += change
        before_s = moment_s
    return charged


def bill(
    hour_usd: float | None, wall_s: float, load_s: float, busy_s: Mapping[str, float]
) -> list[Line]:
    """Loading, the requests of each load, and the rest as `idle`: together `wall_s`."""
    seconds = {"load": load_s, **busy_s}
    seconds["idle"] = wall_s - sum(seconds.values())
    return [Line(name, length_s, usd_of(hour_usd, length_s)) for name, length_s in seconds.items()]
