"""The `quantize` section."""

from __future__ import annotations

from typing import Literal

from tunesmith.config.schema.base import Positive, Section

Scheme = Literal["w8a8-int8", "w4a16", "fp8-dynamic"]


class Quantize(Section):
    """Compressed checkpoints of the tuned model (of the base where the recipe trains nothing), in
    the format that vLLM loads."""

    scheme: Scheme | tuple[Scheme, ...]
    """One scheme or several; each becomes a checkpoint of its own."""

    calibration_rows: Positive = 128
    """Training conversations used to calibrate, rendered with the recipe's own template."""
