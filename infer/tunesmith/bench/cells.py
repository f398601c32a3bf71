"""What stands in the cells of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def invalid(name: str, faults: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why a run may not be believed: a sentence for each check that it failed."""
    details: dict[str, list[str]] = {}
    for fault in faults:
        details.setdefault(fault["check"], []).append(fault["detail"])
    return [f"{name} is INVALID: {check}: {'; '.join(of)}" for check, of in details.items()]


def frontier_columns() -> list[str]:
    """Of the table of `bench frontier`."""
    return [
        "Model", "Loss, %", "Tokens/s", "Change, %", "Goodput/s", "TTFT ms, p50 / p95",
        "USD per M in / out", "Weights / engine", "Keeps", "Pareto", "Run",
    ]  # fmt: skip


def frontier_remarks(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why models were refused, their quality is unknown or their runs are in doubt."""
    found = []
    for cell in cells:
        name = cell["variant"]
        if "refused" in cell:
            found.append(f"{name} is refused ({cell['kind']}): {cell['refused']}")
        elif cell["quality"] not in ("measured", "reference"):
            found.append(f"{name}: quality is unknown: {cell['quality']}")
        found += invalid(name, cell.get("faults", ()))
    return found


def frontier_row(cell: Mapping[str, Any]) -> list[str]:
    """One model; every cell that is empty has its reason below the table."""
    if "refused" in cell:
        return [cell["variant"], *[NOTHING] * (len(frontier_columns()) - 2), "refused"]
    change, rate, speed = cell["loss_change"], cell["output_tokens_per_s"], cell["speed_change"]
    kept = {"quality": cell["keeps_quality"], "SLO": cell["keeps_slo"]}
    return [
        cell["variant"],
        _change(change) if change else NOTHING,
        f"{rate['value']:,.0f}" if rate else NOTHING,
        _change(speed) if speed else NOTHING,
        f"{cell['goodput']['requests_per_s']:.2f}",
        pair(cell["ttft_ms"]),
        f"{usd(cell['usd_per_million_input_tokens'])} / "
        f"{usd(cell['usd_per_million_output_tokens'])}",
        f"{say.size(cell['weights_bytes'])} / {say.size(cell['engine_bytes'])}",
        " + ".join(name for name, good in kept.items() if good) or NOTHING,
        "yes" if cell["pareto"] else NOTHING,
        "VALID" if cell["valid"] else "INVALID",
    ]


def settings_columns() -> list[str]:
    """Of the table of `bench settings`."""
    return [
        "Key", "Value", "Tokens/s", "Change, %", "Goodput/s", "TTFT ms, p50 / p95",
        "TPOT ms, p50 / p95", "Engine", "Verdict",
    ]  # fmt: skip


def settings_rows(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each value of each key; the first of a key is what the others take turns with."""
    rows = []
    for step in steps:
        for place, entry in enumerate(step["tried"]):
            named = ["" if place else step["key"], str(entry["value"])]
            if "refused" in entry:
                rows.append([*named, *[NOTHING] * (len(settings_columns()) - 3), "refused"])
                continue
            rate, change = entry["output_tokens_per_s"], entry.get("change")
            verdict = entry["verdict"] if place else "compared with"
            rows.append(
                [
                    *named,
                    f"{rate['value']:,.0f}" if rate else NOTHING,
                    _change(change) if change else NOTHING,
                    f"{entry['goodput']['requests_per_s']:.2f}",
                    pair(entry["ttft_ms"]),
                    pair(entry["tpot_ms"]),
                    say.size(entry["engine_bytes"]),
                    f"{verdict}, taken" if entry["value"] == step["best"] else verdict,
                ]
            )
    return rows


def _change(change: Mapping[str, float]) -> str:
    half = (change["high"] - change["low"]) / 2
    return f"{100 * change['value']:+.2f} ± {100 * half:.2f}"
