"""Whether to run a model oneself: what a request costs with everything in it, against an API.
Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.config.schema.bench import Bench


@dataclass(frozen=True)
class Capacity:
    """What one engine was measured to answer."""

    requests_per_s: float
    accepted_share: float
    """Of the requests that it answered within the promise."""
    input_tokens: float
    """Of a mean request."""
    output_tokens: float


@dataclass(frozen=True)
class Economics:
    """Costs at the measured capacity. USD."""

    usd_per_request: float
    """Of the engine's time alone."""
    usd_per_accepted_request: float | None
    """The same for each answer that was within the promise; None when none was."""
    made_usd: float | None
    """What training and quantizing the model cost."""
    made_usd_per_request: float | None
    """Its share of each of `bench.lifetime_requests`."""
    api_usd_per_request: float | None
    break_even_requests_per_hour: float | None
    """Traffic above which one engine is cheaper than the API; None when it never is."""
    engines: int | None
    """That `bench.requests_per_hour` takes."""
    hour_usd: float | None
    """Of those engines."""
    api_hour_usd: float | None
    """Of the API, for the same traffic."""
    payback_requests: float | None
    """After which the savings have paid for training and quantizing; None when there are none."""


def economics(
    bench: Bench, hour_usd: float, capacity: Capacity, made_usd: float | None
) -> Economics:
    """An engine is paid for by the hour, whether it is asked or not; an API by the token."""
    per_hour = 3600 * capacity.requests_per_s
    own_usd = hour_usd / per_hour
    made_each = made_usd / bench.lifetime_requests if made_usd and bench.lifetime_requests else None
    api_usd = _api_usd(bench, capacity)
    break_even = hour_usd / api_usd if api_usd else None
    traffic = bench.requests_per_hour
    engines = math.ceil(traffic / per_hour) if traffic else None
    engines_usd = engines * hour_usd if engines else None
    saved_usd = None
    if api_usd:
        paid_usd = engines_usd / traffic if engines_usd and traffic else own_usd
        saved_usd = api_usd - paid_usd
    return Economics(
        usd_per_request=own_usd,
        usd_per_accepted_request=(
            own_usd / capacity.accepted_share if capacity.accepted_share else None
        ),
        made_usd=made_usd,
        made_usd_per_request=made_each,
        api_usd_per_request=api_usd,
        break_even_requests_per_hour=break_even if break_even and break_even <= per_hour else None,
        engines=engines,
        hour_usd=engines_usd,
        api_hour_usd=traffic * api_usd if traffic and api_usd else None,
        payback_requests=made_usd / saved_usd if made_usd and saved_usd and saved_usd > 0 else None,
    )


def _api_usd(bench: Bench, capacity: Capacity) -> float | None:
    """What the API asks for a mean request."""
    if bench.api_price is None:
        return None
    return (
        capacity.input_tokens * bench.api_price.input_usd_per_million_tokens
        + capacity.output_tokens * bench.api_price.output_usd_per_million_tokens
    ) / 1e6
