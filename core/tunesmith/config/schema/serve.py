"""The `serve` section."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from tunesmith.config.schema.base import NonNegative, Positive, Section, Variant
from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.config.schema.routes import Rollout, Route, TokenPrice, Upstream

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


class RequestLog(Section):
    """One line for each request, in the store's `serve` folder."""

    payload: bool = False
    """Also keep the bodies of requests and answers."""

    redact: tuple[str, ...] = ()
    """Regular expressions; what they match in a kept body is masked."""

    max_payload_characters: Positive = 16_384
    """Longer bodies are cut."""

    rows_per_file: Positive = 100_000
    """Lines that become a Parquet file; newer ones are in the database."""

    @model_validator(mode="after")
    def _patterns_are_valid(self) -> RequestLog:
        for pattern in self.redact:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"redact: {pattern!r} is no regular expression: {error}"
                ) from error
        return self


class Tls(Section):
    """HTTPS in place of HTTP."""

    certificate: Path
    """PEM file with the certificate, and those between it and the root after it."""

    key: Path
    """PEM file with its private key, without a passphrase."""


class Serve(Section):
    """The OpenAI API on one port."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback asks for `api_key_env` or `keys`."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null. It is
    asked by the recipe's name; `upstreams` take its place."""

    upstreams: dict[str, Upstream] = {}
    """Models that answer, by names of their own."""

    routes: dict[str, Route] = {}
    """What clients ask for, and which upstreams answer it; when empty, every upstream by its own
    name."""

    rollout: Rollout = Rollout()
    """How a route moves to a new arm."""

    api_key_env: str | None = None
    """Environment variable that holds one key, without limits, that clients may send; none when
    null."""

    keys: bool = False
    """Ask clients for a key made by `tunesmith keys create`, and hold its limits and budgets."""

    tls: Tls | None = None
    """Answer HTTPS alone; plain HTTP when null."""

    max_body_mib: Positive = 32
    """Largest body of a request; more gets 413."""

    read_timeout_s: Annotated[float, Field(gt=0.0)] = 30.0
    """How long a client may take to send a request's head, and again for its body."""

    write_timeout_s: Annotated[float, Field(gt=0.0)] = 60.0
    """How long a client may leave what waits for it unread before its connection is closed."""

    longest_budget_wait_s: Annotated[float, Field(ge=0.0)] = 10.0
    """How long a request waits that fits a day's budget unless the requests that are open use all
    that they may."""

    max_open_requests: NonNegative = 0
    """Requests that may be open at once; more get 429 at once. 0 is no limit."""

    token_price: TokenPrice | None = None
    """Prices for cost and budgets; when null those that the recipe's benchmark measured."""

    guardrails: tuple[Guardrail, ...] = ()
    """What may not go in or come out."""

    log: RequestLog = RequestLog()
    """The request log."""

    drain_timeout_s: Positive = 30
    """How long open requests may finish after a stop is asked for."""

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Serve:
        if self.model and self.upstreams:
            raise ValueError("model and upstreams: give one of them")
        for name in (*self.upstreams, *self.routes):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r}: names are letters, digits, `.`, `_`, `-` and `/`")
        for name, one in self.upstreams.items():
            over = self.upstreams.get(one.on) if one.on else None
            if one.on and (over is None or over.url or over.on):
                raise ValueError(f"upstreams.{name}.on: {one.on!r} is no upstream with an engine")
        for name, route in self.routes.items():
            asked = {*route.arms, *route.fallback}
            asked |= {route.shadow.upstream} if route.shadow else set()
            if unknown := sorted(asked - {*self.upstreams}):
                known = ", ".join(self.upstreams) or "none"
                raise ValueError(f"routes.{name}: no upstream {unknown[0]!r}; there is {known}")
        return self
