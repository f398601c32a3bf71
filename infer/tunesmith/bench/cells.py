"""What stands in the cells of the tables."""

from __future__ import annotations

from typing import Any

NOTHING = "–"


def pair(percentiles: dict[str, Any]) -> str:
    """p50 and p95."""
    found = [percentiles.get(name) for name in ("p50", "p95")]
    return " / ".join(f"{interval['value']:.1f}" if interval else NOTHING for interval in found)


def usd(value: float | None) -> str:
    """A price."""
    return NOTHING if value is None else f"{value:.4f}"
