"""What stands in the cells of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.report import figures as say

NOTHING = "–"


def pair(percentiles: Mapping[str, Any]) -> str:
    """p50 and p95."""
    found = [percentiles.get(name) for name in ("p50", "p95")]
    return " / ".join(f"{interval['value']:.1f}" if interval else NOTHING for interval in found)


def usd(value: float | None) -> str:
    """A price."""
    return NOTHING if value is None else f"{value:.4f}"


def frontier_columns() -> list[str]:
    """Of the table of `bench frontier`."""
    return [
        "Model", "Loss, %", "Tokens/s", "Goodput/s", "TTFT ms, p50 / p95", "USD per M in / out",
        "Weights / engine", "Keeps", "Pareto", "Run",
    ]  # fmt: skip


def frontier_row(cell: Mapping[str, Any]) -> list[str]:
    """One model; every cell that is empty has its reason below the table."""
    if "refused" in cell:
        return [cell["variant"], *[NOTHING] * (len(frontier_columns()) - 2), "refused"]
    change, rate = cell["loss_change"], cell["output_tokens_per_s"]
    kept = {"quality": cell["keeps_quality"], "SLO": cell["keeps_slo"]}
    return [
        cell["variant"],
        _change(change) if change else NOTHING,
        f"{rate['value']:,.0f}" if rate else NOTHING,
        f"{cell['goodput']['requests_per_s']:.2f}",
        pair(cell["ttft_ms"]),
        f"{usd(cell['usd_per_million_input_tokens'])} / "
        f"{usd(cell['usd_per_million_output_tokens'])}",
        f"{say.size(cell['weights_bytes'])} / {say.size(cell['engine_bytes'])}",
        " + ".join(name for name, good in kept.items() if good) or NOTHING,
        "yes" if cell["pareto"] else NOTHING,
        "VALID" if cell["valid"] else "INVALID",
    ]


def _change(change: Mapping[str, float]) -> str:
    half = (change["high"] - change["low"]) / 2
    return f"{100 * change['value']:+.2f} ± {100 * half:.2f}"
