"""What a token costs: as the recipe says, or as a benchmark of this model measured it."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.config.schema.routes import Upstream
from tunesmith.config.schema.serve import Serve
from tunesmith.pipeline import Stages
from tunesmith.pipeline.measured import PRICED_BY, is_price, known

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
    """What a benchmark measured for a model of the recipe."""
    for figures, source in known(stages, variant, *PRICED_BY):
        if is_price(figures):
            return TokenPrice(
                figures["usd_per_million_input_tokens"],
                figures["usd_per_million_output_tokens"],
                source,
            )
    return None
