"""Where `serve` sends requests: its `upstreams`, `routes` and `rollout`."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.schema.base import (
    Fraction,
    Money,
    NonNegative,
    Positive,
    RecoveredName,
    SchemeName,
    Section,
    Variant,
)

_VARIANTS = {
    *(one for one in typing.get_args(Variant) if isinstance(one, str)),
    *typing.get_args(SchemeName),
    *typing.get_args(RecoveredName),
}
_STEPS = (1.0, 10.0, 50.0, 100.0)


class TokenPrice(Section):
    """What tokens cost their users."""

    input_usd_per_million_tokens: Money
    """Price of the tokens of prompts."""

    output_usd_per_million_tokens: Money
    """Price of the tokens of answers."""


class Upstream(Section):
    """What answers: a model of the recipe on an engine of its own (`model`), a further adapter on
    the engine of another upstream (`adapter`, `on`), or an OpenAI-compatible API (`url`, `model`).
    """

    model: str | None = None
    """A model of the recipe, such as `tuned`; with `url`, the model's name there."""

    adapter: str | None = None
    """A LoRA adapter for the engine of `on`: an artifact's id, NAME@ALIAS, or a folder."""

    on: str | None = None
    """The upstream whose engine also serves `adapter`."""

    url: Annotated[str, Field(pattern=r"^https?://\S+[^/]$")] | None = None
    """Base of an API that runs elsewhere, such as `https://api.example.com/v1`."""

    api_key_env: str | None = None
    """Environment variable with the key that `url` asks for."""

    token_price: TokenPrice | None = None
    """What its tokens cost; when null `serve.token_price`, else what a benchmark measured."""

    adapter_slots: Positive = 2
    """Adapters that the engine of an adapter may hold at once; two let one replace another."""

    max_open_requests: NonNegative = 0
    """Requests that may be open there at once; with more the next of the route's `fallback` is
    asked, else clients get 429. 0 is no limit."""

    max_model_len: Positive | None = None
    """With `url`: longest prompt plus answer in tokens, where the API does not tell."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of GPU memory for its engine, in place of `engine.gpu_memory_utilization`."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Upstream:
        if self.url:
            if self.model is None or self.adapter or self.on:
                raise ValueError("url needs model, the name there, and neither adapter nor on")
            return self
        if self.api_key_env or self.max_model_len:
            raise ValueError("api_key_env and max_model_len belong to an upstream with url")
        if self.adapter or self.on:
            if not (self.adapter and self.on) or self.model:
                raise ValueError("adapter and on go together, without model")
            return self
        if self.model not in _VARIANTS:
            raise ValueError(
                "model: give a model of the recipe, such as tuned, adapter or w4a16, or a url"
                if self.model is None
                else f"model: {self.model!r} is none of {', '.join(sorted(_VARIANTS))}; "
                "for an API that runs elsewhere give its url too"
            )
        return self


class Shadow(Section):
    """Copies of a route's requests that a second model answers for nobody but the log."""

    upstream: str
    """Who answers them."""

    share: Fraction = 1.0
    """Share of the requests that are copied while the upstream has room to spare."""


class Route(Section):
    """One model name that clients ask for."""

    arms: dict[str, Annotated[float, Field(gt=0.0)]]
    """Upstreams and the weight of each: its share of the requests is its share of the sum."""

    sticky: Literal["user", "key", "none"] = "user"
    """Whose requests stay with one arm: those with the same `user` (without one, each request is
    drawn anew), or those of the same API key."""

    fallback: tuple[str, ...] = ()
    """Upstreams to ask, in this order, when the arm fails before the first byte of its answer: by
    5xx, 429, a lost connection, or `timeout_s`, or because it is full or not ready."""

    timeout_s: Annotated[float, Field(gt=0.0)] | None = None
    """Longest wait for the first byte of an answer; null waits as long as it takes."""

    shadow: Shadow | None = None
    """Copy requests to another upstream, to see what it would do."""

    @model_validator(mode="after")
    def _has_an_arm(self) -> Route:
        if not self.arms:
            raise ValueError("arms: name at least one upstream, such as {tuned: 1}")
        return self


class Rollout(Section):
    """When a new arm of `tunesmith rollout start` goes on, is held, or is taken back."""

    steps_percent: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = _STEPS
    """Shares of the route that the new arm gets, one after another."""

    min_requests: Positive = 50
    """Requests to each arm, within a step, before anything is decided."""

    false_rollbacks: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.01
    """How likely it may be that a rollout of an arm that keeps within all tolerances is taken back,
    however often and long it is looked at."""

    error_tolerance: Fraction = 0.02
    """How much larger the share of failing requests may be: 0.02 is two in a hundred."""

    latency_tolerance: Annotated[float, Field(ge=0.0)] | None = 0.25
    """How much longer answers may take: 0.25 is a quarter. Null does not look at it."""

    cost_tolerance: Annotated[float, Field(ge=0.0)] | None = 0.25
    """How much more answers may cost. Null does not look at it."""

    quality_tolerance: Fraction = 0.02
    """How much smaller the share of `probes` that pass may be."""

    probes: Path | None = None
    """JSONL file of prompts with checks, which both arms answer from spare capacity."""

    @model_validator(mode="after")
    def _steps_rise_to_all(self) -> Rollout:
        steps = self.steps_percent
        if not steps or list(steps) != sorted(set(steps)) or steps[-1] != 100.0:
            raise ValueError("steps_percent: rising shares of which the last is 100")
        return self
