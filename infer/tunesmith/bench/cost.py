"""What tokens cost. Pure: measured rates and a price in, USD out.

The rule that splits a machine's price between input and output tokens: the same prompts are sent
twice with the same number in flight, once asking for one token and once for the whole answer.
The first takes the time the engine needs to read the prompts; its share of the second is the
input's share of the price, the rest is the output's. Idle time is shared the same way, so that

    input tokens/s × input price + output tokens/s × output price = the machine's price

holds at any load. The first token of an answer counts as reading: the engine makes it there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.bench.figures import Throughput


@dataclass(frozen=True)
class TokenCosts:
    """Prices that add up to what the machine costs at the measured rates."""

    usd_per_million_input_tokens: float
    usd_per_million_output_tokens: float
    usd_per_request: float


def input_share(read_s: float, whole_s: float) -> float:
    """The input's share of the price, by the rule above; between 0 and 1."""
    return min(1.0, read_s / whole_s)


def token_costs(hour_usd: float | None, rates: Throughput, share: float) -> TokenCosts | None:
    """Prices per token at these rates; None without a price or without tokens."""
    if hour_usd is None or not rates.input_tokens_per_s or not rates.requests_per_s:
        return None
    second_usd = hour_usd / 3600
    return TokenCosts(
        usd_per_million_input_tokens=1e6 * second_usd * share / rates.input_tokens_per_s,
        usd_per_million_output_tokens=(
            1e6 * second_usd * (1 - share) / rates.output_tokens_per_s.value
        ),
        usd_per_request=second_usd / rates.requests_per_s,
    )
