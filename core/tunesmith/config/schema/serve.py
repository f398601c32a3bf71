"""The `serve` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.config.schema.base import Positive, Section, Variant


class Serve(Section):
    """The OpenAI API on one port."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback asks for `api_key_env`."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null."""

    api_key_env: str | None = None
    """Environment variable that holds the key clients must send; no key when null."""

    drain_timeout_s: Positive = 30
    """How long open requests may finish after a stop is asked for."""
