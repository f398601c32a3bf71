"""What benchmarks on this machine have measured of a recipe's models: for planning, and serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tunesmith.pipeline.stages import Stages

PRICED_BY = ("serve", "batch", "frontier")
"""Modes of `tunesmith bench` that give prices, those whose load is most like serving first."""


class Known(NamedTuple):
    """One benchmark's word on one model."""

    figures: dict[str, Any]
    source: str
    """Id of the benchmark."""


def known(stages: Stages, variant: str, *modes: str) -> Iterator[Known]:
    """What finished benchmarks of these modes say of a model that the engine ran."""
    if stages.recipe.bench is None:
        return
    for mode in modes:
        found = stages.store.find(stages.bench(mode).id)
        figures = found.manifest.metrics.get("variants", {}).get(variant) if found else None
        if found and figures and "refused" not in figures:
            yield Known(figures, found.id)


def is_price(figures: dict[str, Any]) -> bool:
    """Only a valid run is a price."""
    return bool(
        figures.get("valid")
        and figures.get("usd_per_million_input_tokens") is not None
        and figures.get("usd_per_million_output_tokens") is not None
    )
