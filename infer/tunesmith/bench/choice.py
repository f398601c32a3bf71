"""Which models no other one beats, and the cheapest that keeps quality and promise. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cell = Mapping[str, Any]


def choose(cells: Sequence[Cell], most_loss: float) -> list[dict[str, Any]]:
    """The cells with what each keeps, and whether it is on the Pareto set of loss and price."""
    known = [cell for cell in cells if is_complete(cell)]
    return [
        {
            **cell,
            "keeps_quality": keeps_quality(cell, most_loss),
            "keeps_slo": cell["goodput"]["slo_kept"] if cell.get("goodput") else None,
            "pareto": is_complete(cell) and not any(_beats(other, cell) for other in known),
        }
        for cell in cells
    ]


def cheapest(cells: Sequence[Cell]) -> Cell | None:
    """Of those chosen by `choose`, the cheapest that may be believed and keeps both."""
    kept = [cell for cell in cells if is_complete(cell) and _keeps_both(cell)]
    return min(kept, key=_usd, default=None)


def is_complete(cell: Cell) -> bool:
    """Whether quality and price are known of it, by runs that may be believed."""
    return bool(
        cell.get("valid")
        and cell.get("loss_change")
        and cell.get("usd_per_million_output_tokens") is not None
    )


def keeps_quality(cell: Cell, most_loss: float) -> bool | None:
    """Whether its loss is within the limit with all of its interval; None where it is unknown."""
    change = cell.get("loss_change")
    return None if change is None else bool(change["high"] <= most_loss)


def verdict(cells: Sequence[Cell]) -> str:
    """The choice in a sentence."""
    best = cheapest(cells)
    front = ", ".join(cell["variant"] for cell in cells if cell["pareto"]) or "none"
    if best is None:
        return f"{_why_none(cells)}. On the Pareto set: {front}."
    return (
        f"{best['variant']} is the cheapest that keeps quality and promise: "
        f"USD {_usd(best):.4g} per million output tokens. On the Pareto set: {front}."
    )


def _why_none(cells: Sequence[Cell]) -> str:
    kept = [cell for cell in cells if _keeps_both(cell)]
    if not kept:
        return "No model keeps both quality and promise"
    names = ", ".join(cell["variant"] for cell in kept)
    is_valid = any(cell["valid"] for cell in kept)
    lack = "without a price in the recipe" if is_valid else "by runs that are INVALID"
    return f"{names}: quality and promise are kept, {lack}"


def _keeps_both(cell: Cell) -> bool:
    return bool(cell["keeps_quality"] and cell["keeps_slo"])


def _beats(one: Cell, other: Cell) -> bool:
    """At least as good in both, and better in one."""
    left, right = ((_loss(cell), _usd(cell)) for cell in (one, other))
    return left != right and left[0] <= right[0] and left[1] <= right[1]


def _loss(cell: Cell) -> float:
    return float(cell["loss_change"]["value"])


def _usd(cell: Cell) -> float:
    return float(cell["usd_per_million_output_tokens"])
