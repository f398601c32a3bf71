"""What a token costs: as the recipe says, or as a benchmark of this model measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.config.schema.routes import Upstream
from tunesmith.config.schema.serve import Serve
from tunesmith.pipeline import Stages

_NANO_PER_TOKEN = 1000
"""Nano-USD per token of one USD per million tokens."""


@dataclass(frozen=True)
class TokenPrice:
    """Prices of one model."""

    input_usd_per_million_tokens: float
    output_usd_per_million_tokens: float
    source: str
    """Where they come from: the recipe, or the id of a benchmark."""

    def nano_usd(self, prompt_tokens: int, output_tokens: int) -> int:
        """The price of a request, rounded to nano-USD."""
        usd_per_million = (
            prompt_tokens * self.input_usd_per_million_tokens
            + output_tokens * self.output_usd_per_million_tokens
        )
        return round(usd_per_million * _NANO_PER_TOKEN)


def given_price(section: Upstream | None, serve: Serve) -> TokenPrice | None:
    """What the recipe says: for one upstream, else for all."""
    given = (section and section.token_price) or serve.token_price
    if given is None:
        return None
    return TokenPrice(
        given.input_usd_per_million_tokens, given.output_usd_per_million_tokens, "the recipe"
    )


def find_price(stages: Stages, variant: str) -> TokenPrice | None:
    """What `bench serve` or `bench batch` measured for a model of the recipe."""
    if stages.recipe.bench is None:
        return None
    for mode in ("serve", "batch", "frontier"):
        found = stages.store.find(stages.bench(mode).id)
        measured = found.manifest.metrics.get("variants", {}).get(variant) if found else None
        if found and measured and (price := _measured(measured, found.id)):
            return price
    return None


def _measured(figures: dict[str, Any], source: str) -> TokenPrice | None:
    """Only a valid run is a price."""
    per_input = figures.get("usd_per_million_input_tokens")
    per_output = figures.get("usd_per_million_output_tokens")
    if not figures.get("valid") or per_input is None or per_output is None:
        return None
    return TokenPrice(per_input, per_output, source)
