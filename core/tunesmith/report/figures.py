"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.statistics import Interval

NOTHING = "–"


def size(size_bytes: int | None) -> str:
    """`6.4 MiB`, `14.9 GiB`."""
    if size_bytes is None:
        return NOTHING
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / 2**30:.2f} GiB"


def usd(value: float | None) -> str:
    """`$0.0393`, `$12.3`, `$1,240`."""
    return NOTHING if value is None else f"${price(value)}"


def price(value: float | None) -> str:
    """To three significant digits, never in powers of ten."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    digits = next(places for places in range(1, 12) if value * 10**places >= 99.95)
    return f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float, digits: int = 1) -> str:
    """A signed share, with a true minus: `−27.4 %`."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def bounds(interval: Interval, digits: int) -> str:
    """`3.10 – 3.22`."""
    return f"{interval.low:.{digits}f} – {interval.high:.{digits}f}"


def percent_bounds(interval: Interval, digits: int = 1) -> str:
    """`−28.3 to −26.5 %`."""
    low, high = (f"{100 * bound:+.{digits}f}" for bound in (interval.low, interval.high))
    return f"{low} to {high} %".replace("-", "−")


def change_digits(interval: Interval) -> int:
    """Decimals that show a small change: two within 2 %, else one."""
    return 2 if abs(interval.value) < 0.02 else 1


def rate(figures: Mapping[str, Any] | None) -> str:
    """Output tokens per second of a bench."""
    found = figures.get("output_tokens_per_s") if figures else None
    return f"{found['value']:,.0f}" if found else NOTHING


def two_percentiles(figures: Mapping[str, Any] | None, name: str) -> str:
    """`42 / 106`: p50 and p95 in milliseconds."""
    found = [figures.get(name, {}).get(key) if figures else None for key in ("p50", "p95")]
    if not any(found):
        return NOTHING
    return " / ".join(
        _milliseconds(interval["value"]) if interval else NOTHING for interval in found
    )


def _milliseconds(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
