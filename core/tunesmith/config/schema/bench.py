"""The `bench` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.config.schema.base import Positive, Section


class Slo(Section):
    """The promise that goodput is counted against."""

    ttft_p95_ms: Annotated[float, Field(gt=0.0)] = 500.0
    """Time to first token."""

    tpot_p95_ms: Annotated[float, Field(gt=0.0)] = 50.0
    """Time per output token after the first."""


class Bench(Section):
    """Throughput, latency and cost of the tuned and quantized models."""

    requests: Positive = 64
    """Measured requests per model and mode."""

    concurrency: Positive = 32
    """Requests in flight for batch throughput."""

    request_rate: Annotated[float, Field(gt=0.0)] = 4.0
    """Mean arrivals per second of the real-time load (Poisson)."""

    max_tokens: Positive = 32
    """Output tokens of each request; the end-of-turn token is ignored."""

    slo: Slo = Slo()
    """What a good request is."""
