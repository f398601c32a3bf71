"""The `batch` section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.schema.base import Fraction, Positive, Section, Variant


class Batch(Section):
    """Answers for a file of prompts."""

    input: Path
    """JSONL; each row has `messages` or `prompt`, and may have `id`, `max_tokens`,
    `temperature`."""

    output: Path
    """JSONL, one row per input row, in input order."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null."""

    max_tokens: Positive = 128
    """Longest answer, unless the row says otherwise."""

    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature, unless the row says otherwise; 0 is greedy."""

    max_error_rate: Fraction = 0.0
    """Share of rows that may fail before the command ends with exit code 3."""

    reuse: bool = True
    """Compute equal requests once, and order the others so that the prefix cache helps most; the
    output stays in input order."""

    replicas: Positive | None = None
    """Engines side by side, each with `engine.tensor_parallel_size` GPUs; as many as the GPUs have
    room for when null, one on a CPU (on a cluster, one on each node)."""

    cluster: Literal["ray"] | None = None
    """Run the engines on all nodes of a Ray cluster; on this machine when null."""

    cluster_address: str | None = None
    """`HOST:PORT` of the cluster; `RAY_ADDRESS`, else the cluster that this machine is a node of,
    when null."""
