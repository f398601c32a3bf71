"""The `quantize` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.schema.base import Fraction, NonNegative, Positive, Section

Scheme = Literal["w8a8-int8", "w4a16", "fp8-dynamic"]


class Quantize(Section):
    """Compressed checkpoints of the tuned model (of the base where the recipe trains nothing), in
    the format that vLLM loads."""

    scheme: Scheme | tuple[Scheme, ...]
    """One scheme or several; each becomes a checkpoint of its own."""

    calibration_rows: Positive = 128
    """Training conversations used to calibrate, rendered with the recipe's own template."""

    verify_rows: NonNegative = 64
    """Held-out rows on which each checkpoint is compared with its parent, in the engine; 0 leaves
    checkpoints unverified."""

    max_loss_increase: Fraction | None = 0.05
    """Gate: how far the completion loss may rise above the parent's (0.01 is 1 %); no limit when
    null. Each gate compares the upper bound of the figure's interval: what few rows leave open is
    not approved."""

    max_kl: Annotated[float, Field(ge=0.0)] | None = 0.1
    """Gate: Kullback-Leibler divergence of the next-token distributions from the parent's, in nats
    per learnt token; no limit when null."""

    max_flipped: Fraction | None = None
    """Gate: share of learnt positions at which the likeliest token is another than the parent's;
    no limit when null."""

    allow_refused: bool = False
    """Let serve, batch and bench take a checkpoint that its verification refused."""
