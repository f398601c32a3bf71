"""What answers requests: a model on an engine of ours, or one behind somebody's URL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.serve.client import Client, LostError
from tunesmith.serve.govern.measure import Measure
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.terminal import log

_UNKNOWN_MODEL_LEN = 131_072
_PROBE_INTERVAL_S = 2.0
_PROBE_TIMEOUT_S = 5.0
_SPARE = 0.5


class Place(Protocol):
    """Where an upstream is asked."""

    @property
    def url(self) -> str:
        """Base of the API."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        ...


@dataclass
class Load:
    """What is open at one place, by all its upstreams together."""

    capacity: int = 64
    """Requests that it works on at once."""

    most_open: int = 0
    """Requests that may be open; 0 is no limit."""

    open: int = 0

    @property
    def is_full(self) -> bool:
        return bool(self.most_open) and self.open >= self.most_open

    @property
    def has_spare(self) -> bool:
        """Whether work that nobody waits for would hold up nobody."""
        return self.open < max(1.0, self.capacity * _SPARE)


@dataclass
class Upstream:
    """One model at one place, in one version that never changes."""

    name: str
    """What the recipe calls it; an adapter's version has the hash of its files in it."""

    model: str
    """What it is called there."""

    place: Place
    artifact_id: str
    """Where its weights come from."""

    load: Load = field(default_factory=Load)
    headers: Mapping[str, str] = field(default_factory=dict)
    measure: Measure = field(default_factory=lambda: Measure(None))
    price: TokenPrice | None = None
    is_vllm: bool = True
    max_model_len: int | None = None
    """Longest prompt and answer together; asked of the engine when None."""

    open: int = 0
    held: int = 0
    """Requests that may still ask it."""

    @property
    def can_take(self) -> bool:
        """Whether it is worth asking."""
        return self.place.is_ready and not self.load.is_full

    @property
    def has_spare(self) -> bool:
        """Whether it may be given work that nobody waits for."""
        return self.place.is_ready and self.load.has_spare and not self.load.is_full

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """One request is open here while the block lasts."""
        self.open += 1
        self.load.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self.load.open -= 1

    async def model_len(self, client: Client) -> int:
        """The longest prompt and answer together; an engine is asked once. Of an API that does not
        tell it is as long as any model's, so that nothing more than was reserved can be used."""
        if self.max_model_len is None and self.is_vllm:
            url = f"{self.place.url}/models"
            with (
                contextlib.suppress(LostError),  # which whoever asks it next finds out
                await client.ask("GET", url, headers=self.headers) as answer,
            ):
                (model, *_) = (await answer.json())["data"]
                self.max_model_len = int(model["max_model_len"])
        return self.max_model_len or _UNKNOWN_MODEL_LEN


@contextlib.contextmanager
def held(upstreams: Sequence[Upstream]) -> Iterator[None]:
    """None of these is unloaded while the block lasts."""
    for one in upstreams:
        one.held += 1
    try:
        yield
    finally:
        for one in upstreams:
            one.held -= 1


class Attached:
    """An API that runs elsewhere: asked every few seconds whether it is there."""

    def __init__(self, name: str, url: str, headers: Mapping[str, str]) -> None:
        self.name, self.url, self.headers = name, url, headers
        self.is_ready = False
        self._again = asyncio.Event()

    def doubt(self) -> None:
        """A request found nobody there: look again now."""
        self.is_ready = False
        self._again.set()

    async def watch(self, client: Client, upstream: Upstream) -> None:
        """Keep `is_ready` true to life, and `upstream` to what the API says of its model, until
        cancelled."""
        said: str | None = None
        while True:
            fault = await self._probe(client, upstream)
            self.is_ready = fault is None
            if fault != said:
                log(f"serve: {self.name} at {self.url}: {fault or 'answers'}")
            said = fault
            self._again.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), _PROBE_INTERVAL_S)
            if self._again.is_set():
                await asyncio.sleep(_PROBE_INTERVAL_S / 10)

    async def _probe(self, client: Client, upstream: Upstream) -> str | None:
        """What is wrong with it; None when nothing is. An API need not list its models."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                url = f"{self.url}/models"
                with await client.ask("GET", url, headers=self.headers) as answer:
                    if answer.status in (401, 403):
                        return f"refuses the key (HTTP {answer.status})"
                    if target := answer.headers.get("location"):
                        return f"redirects to {target}; what is there belongs into its url"
                    if answer.status >= 500:
                        return f"answers HTTP {answer.status}"
                    if answer.status == 200:
                        _read(await answer.json(), upstream)
        except (LostError, TimeoutError) as error:
            return f"cannot be reached: {str(error) or type(error).__name__}"
        except ValueError:
            return "answers something that is no list of models; is its url right?"
        return None


def _read(listing: Any, upstream: Upstream) -> None:
    """Take over what a list of models says of one; raises ValueError where it is none."""
    models = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(models, list):
        raise ValueError("not a list of models")
    for model in models:
        if isinstance(model, dict) and model.get("id") == upstream.model:
            upstream.is_vllm = model.get("owned_by") == "vllm"
            if upstream.max_model_len is None and isinstance(model.get("max_model_len"), int):
                upstream.max_model_len = model["max_model_len"]
