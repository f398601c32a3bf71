"""The `bench` section."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.schema.base import Fraction, Money, Positive, Section, Variant

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Rate = Annotated[float, Field(gt=0.0)]


class Slo(Section):
    """The promise that goodput is counted against."""

    ttft_p95_ms: Annotated[float, Field(gt=0.0)] = 500.0
    """Time to first token."""

    tpot_p95_ms: Annotated[float, Field(gt=0.0)] = 50.0
    """Time per output token after the first."""


class Lengths(Section):
    """One kind of synthetic request."""

    input_tokens: Positive
    """Tokens of the prompt, exactly."""

    output_tokens: Positive
    """Tokens of the answer, exactly."""

    share: Annotated[float, Field(gt=0.0)] = 1.0
    """How often it is asked, against the other kinds."""


class Settings(Section):
    """Values of the `engine` section that `bench settings` tries beside the recipe's own."""

    max_num_seqs: tuple[Positive, ...] = ()
    """Sequences decoded together."""

    max_num_batched_tokens: tuple[Positive, ...] = ()
    """Tokens computed in one pass."""

    enable_chunked_prefill: tuple[bool, ...] = ()
    """Whether long prompts are cut."""

    enable_prefix_caching: tuple[bool, ...] = ()
    """Whether keys and values of prompts are kept."""

    kv_cache_dtype: tuple[Literal["auto", "fp8"], ...] = ()
    """Precision of the key-value cache."""


class EngineChange(Section):
    """What differs from the `engine` section; null is the recipe's own."""

    max_num_seqs: Positive | None = None
    """Sequences decoded together."""

    max_num_batched_tokens: Positive | None = None
    """Tokens computed in one pass."""

    enable_chunked_prefill: bool | None = None
    """Whether long prompts are cut."""

    enable_prefix_caching: bool | None = None
    """Whether keys and values of prompts are kept."""

    kv_cache_dtype: Literal["auto", "fp8"] | None = None
    """Precision of the key-value cache."""


class ApiPrice(Section):
    """What an API asks for the same tokens."""

    input_usd_per_million_tokens: Money
    """Price of the tokens of prompts."""

    output_usd_per_million_tokens: Money
    """Price of the tokens of answers."""


class Bench(Section):
    """Throughput, latency and cost of the tuned and quantized models."""

    requests: Positive = 64
    """Measured requests per model, mode and round."""

    rounds: Positive = 2
    """How often the same load is repeated; where the rounds differ, the machine is noisy."""

    concurrency: Positive = 32
    """Requests in flight for batch throughput."""

    request_rate: Rate = 4.0
    """Mean arrivals per second of the real-time load."""

    arrivals: Literal["poisson", "gamma", "constant", "trace"] = "poisson"
    """Independent arrivals, bursts (`burstiness`), even ones, or those of `trace`."""

    burstiness: Annotated[float, Field(gt=0.0)] = 1.0
    """For `gamma`: variance of the gaps over their squared mean; 1 is Poisson, more is burstier."""

    trace: Path | None = None
    """For `trace`: Parquet, CSV or JSONL with the seconds of each arrival in `at_s`, such as a log
    of the gateway; sped up or slowed down to `request_rate`."""

    prompts: Literal["data", "synthetic", "log"] = "data"
    """Held-out rows, random tokens of `lengths`, or the requests of `log`."""

    lengths: tuple[Lengths, ...] = ()
    """For `synthetic`: the mix of request lengths."""

    log: Path | None = None
    """For `log`: a Parquet file of the gateway's request log, or a folder of them. Bodies that it
    kept are asked again, others become random tokens of the same number."""

    reuse: bool = False
    """Let prompts repeat, where the prefix cache is the question; otherwise each is made unique."""

    max_tokens: Positive = 32
    """Output tokens of each request where the mix does not say; end-of-turn tokens are ignored."""

    slo: Slo = Slo()
    """What a good request is."""

    rates: tuple[Rate, ...] = ()
    """Arrival rates of `bench sweep`; it also searches the highest that keeps `slo`."""

    concurrencies: tuple[Positive, ...] = ()
    """Numbers in flight of `bench sweep`."""

    search_s: Annotated[float, Field(gt=0.0)] = 600.0
    """Longest time that `bench sweep` loads one model, and that `bench settings` takes."""

    search_tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """How near to the highest rate that keeps `slo` the search goes, as a share of it."""

    settings: Settings = Settings()
    """What `bench settings` tries, key after key, with the last model of the recipe."""

    variants: tuple[Variant, ...] | None = None
    """What `bench frontier` compares; every model of the recipe when null."""

    engines: dict[str, EngineChange] = {}
    """Other settings of the engine, by name, under which `bench frontier` measures each of these
    models too."""

    most_loss: Fraction = 0.02
    """How far above the reference's loss a model may be, for `bench frontier` to say that it keeps
    quality."""

    api_price: ApiPrice | None = None
    """An API to compare with."""

    requests_per_hour: Rate | None = None
    """Expected traffic, to compare with `api_price`; when null, only where both cost the same."""

    lifetime_requests: Positive | None = None
    """Requests that share the cost of training and quantizing; it is not added when null."""

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Bench:
        if self.arrivals == "trace" and self.trace is None and self.prompts != "log":
            raise ValueError("arrivals: trace needs a file in trace, or prompts: log")
        if self.trace and self.arrivals != "trace":
            raise ValueError("trace is given exactly when arrivals is trace")
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            raise ValueError("burstiness is for arrivals: gamma")
        if (self.prompts == "synthetic") != bool(self.lengths):
            raise ValueError("lengths is given exactly when prompts is synthetic")
        if (self.prompts == "log") != (self.log is not None):
            raise ValueError("log is given exactly when prompts is log")
        for name, change in self.engines.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"engines: {name!r}: names are letters, digits, `.`, `_` and `-`")
            if change == EngineChange():
                raise ValueError(f"engines.{name} changes nothing")
        return self
