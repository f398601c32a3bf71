"""The `evaluate` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.schema.base import Positive, Section, Variant

Task = Literal["completion_loss", "chrf", "rouge_l"]


class Evaluate(Section):
    """Quality of each model on held-out rows, in the engine that serves it."""

    variants: tuple[Variant, ...] | None = None
    """Which models of the recipe are measured; when null all, the unmerged adapter only where
    there is no merged model."""

    tasks: tuple[Task, ...] = ("completion_loss", "chrf")
    """What is measured, row by row and paired between models."""

    max_rows: Positive | None = 200
    """Held-out rows, chosen by `seed`; all when null."""

    max_tokens: Positive = 48
    """Longest generated answer."""

    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of the confidence intervals."""
