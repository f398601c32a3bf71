"""One running server, loaded phase by phase: warm-up, prompts only, full queue, arrivals."""

from __future__ import annotations

import asyncio
import math
import os
import string
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tunesmith.bench.arrivals import arrivals
from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.energy import EnergyMeter
from tunesmith.bench.figures import Window, arrivals_window, full_queue_window
from tunesmith.bench.generator import Generator, Job
from tunesmith.bench.traffic import Prompt, unique_prompts
from tunesmith.bench.validity import Evidence, Fault, faults
from tunesmith.config import DataError, TunesmithError
from tunesmith.config.schema.bench import Bench
from tunesmith.terminal import log

ATTEMPTS = 2  # the server being up, a doubtful load costs little to measure once more
_SALT_TOKENS = 16  # more than a salt can take
_SETTLE_S = 0.1


@dataclass(frozen=True)
class Target:
    """What is measured."""

    name: str
    """For people."""
    url: str
    """The OpenAI API, ending in `/v1`."""
    model: str
    """As the API calls it."""

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


@dataclass(frozen=True)
class Phase:
    """One load, repeated, and everything that tells whether to believe it."""

    rounds: tuple[Evidence, ...]
    faults: list[Fault]
    discarded: tuple[Phase, ...] = ()
    """Earlier attempts, which were paid for too."""

    @property
    def samples(self) -> list[Sample]:
        """Of all rounds, in their order."""
        return [sample for one in self.rounds for sample in one.samples]


@dataclass(frozen=True)
class Instruments:
    """What a meter measures with."""

    session: aiohttp.ClientSession
    generator: Generator
    energy: EnergyMeter = field(default_factory=EnergyMeter)


@dataclass(frozen=True)
class Fitted:
    """A mix that fits the server."""

    prompts: Sequence[Prompt]
    common_prefix_tokens: int = 0
    """What all prompts have in common in spite of their salt."""
    vocabulary: Sequence[int] = ()
    """Tokens that random prompts are made of."""


class Meter:
    """Loads one server with prompts that fit it; `open_meter` makes one."""

    def __init__(
        self, target: Target, bench: Bench, seed: int, tools: Instruments, fitted: Fitted
    ) -> None:
        self.target = target
        self.common_prefix_tokens = fitted.common_prefix_tokens
        self._bench = bench
        self._seed = seed
        self._tools = tools
        self._fitted = fitted
        self._phases = 0

    async def warm_up(self) -> Phase:
        """Let the engine compile and fill its pools. Raises TunesmithError when nothing answers."""
        phase = await self._closed("warm-up", self._bench.concurrency, rounds=1)
        samples = phase.samples
        if not any(sample.ok for sample in samples):
            raise TunesmithError(
                f"{self.target.name}: none of {len(samples)} requests was answered; "
                f"the first: {samples[0].error}"
            )
        return phase

    async def prompts_only(self) -> Phase:
        """The full queue asked for one token each: the time that reading the prompts takes."""
        return await self._closed("prompts", self._bench.requests, rounds=1, max_tokens=1)

    async def full_queue(self, concurrency: int | None = None, rounds: int | None = None) -> Phase:
        """So many requests in flight, `bench.concurrency` unless told, until all are answered."""
        return await self._believable(
            "batch",
            lambda name: self._closed(
                name, self._bench.requests, rounds=rounds, concurrency=concurrency
            ),
        )

    async def arrivals(
        self, rate: float | None = None, rounds: int | None = None, least_s: float = 0.0
    ) -> Phase:
        """Requests arriving at a rate, `bench.request_rate` unless told, for `least_s` at least."""
        bench = self._bench
        rate = rate or bench.request_rate
        count = max(bench.requests, math.ceil(rate * least_s))
        moments = arrivals(bench, rate, count, self._seed)
        return await self._believable(
            "serve",
            lambda name: self._phase(
                name, count, arrivals_window, arrivals_s=moments, rounds=rounds
            ),
        )

    async def _closed(
        self,
        name: str,
        count: int,
        *,
        rounds: int | None = None,
        concurrency: int | None = None,
        max_tokens: int | None = None,
    ) -> Phase:
        places = concurrency or self._bench.concurrency
        return await self._phase(
            name,
            count,
            lambda samples: full_queue_window(samples, places),
            concurrency=places,
            max_tokens=max_tokens,
            rounds=rounds,
        )

    async def _believable(self, name: str, measure: Callable[[str], Awaitable[Phase]]) -> Phase:
        """The first attempt without faults, else the last one."""
        discarded: tuple[Phase, ...] = ()
        while True:
            phase = await measure(name)
            # More of the same would be as short.
            doubtful = any(fault.check != "too_short" for fault in phase.faults)
            if not doubtful or len(discarded) + 1 == ATTEMPTS:
                return Phase(phase.rounds, phase.faults, discarded)
            log(f"{self.target.name}: {name} is measured again: {phase.faults[0].detail}")
            discarded += (phase,)

    async def _phase(
        self,
        name: str,
        count: int,
        find_window: Callable[[Sequence[Sample]], Window],
        *,
        arrivals_s: Sequence[float] | None = None,
        concurrency: int = 1,
        max_tokens: int | None = None,
        rounds: int | None = None,
    ) -> Phase:
        """Repeat one load, each time with prompts of its own, and gather the evidence."""
        found = []
        for _ in range(rounds or self._bench.rounds):
            self._phases += 1
            job = self._job(f"{name} {self._phases}", count, arrivals_s, concurrency, max_tokens)
            found.append(await self._round(job, find_window))
        return Phase(tuple(found), faults(found))

    def _job(
        self,
        name: str,
        count: int,
        arrivals_s: Sequence[float] | None,
        concurrency: int,
        max_tokens: int | None,
    ) -> Job:
        prompts = list(
            unique_prompts(
                self._fitted.prompts,
                count,
                self._seed,
                name,
                vocabulary=self._fitted.vocabulary,
                reuse=self._bench.reuse,
            )
        )
        lengths = [max_tokens or prompt.max_tokens or self._bench.max_tokens for prompt in prompts]
        return Job(
            urls=tuple(f"{self.target.url}/{prompt.endpoint}" for prompt in prompts),
            bodies=tuple(
                prompt.body | _forced(self.target.model, length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ),
            arrivals_s=None if arrivals_s is None else tuple(arrivals_s),
            concurrency=concurrency,
        )

    async def _round(self, job: Job, find_window: Callable[[Sequence[Sample]], Window]) -> Evidence:
        before, energy_j = await self._counters(), self._tools.energy.joules()
        # No bar is drawn meanwhile: it would take from the engine's time.
        played = await self._tools.generator.play(job)
        after_j = self._tools.energy.joules()
        return Evidence(
            samples=played.samples,
            counted=await self._counters() - before,
            common_prefix_tokens=self.common_prefix_tokens,
            late_s=played.late_s,
            client_cpu=played.cpu,
            window=find_window(played.samples),
            wall_s=played.wall_s,
            reuse=self._bench.reuse,
            energy_j=None if energy_j is None or after_j is None else after_j - energy_j,
        )

    async def _counters(self) -> Counters:
        """The engine's counters once they stand still: they trail the last token a little."""
        previous = None
        while True:
            async with self._tools.session.get(f"{self.target.root}/metrics") as response:
                counters = Counters.parse(await response.text())
            if counters == previous:
                return counters
            previous = counters
            await asyncio.sleep(_SETTLE_S)


async def open_meter(
    target: Target, bench: Bench, seed: int, tools: Instruments, prompts: Sequence[Prompt]
) -> Meter:
    """A meter with the prompts that leave room for an answer; the server itself counts tokens.

    Raises DataError when none does.
    """
    fitted = await _fit(target, bench, seed, tools.session, prompts)
    return Meter(target, bench, seed, tools, fitted)


async def _fit(
    target: Target,
    bench: Bench,
    seed: int,
    session: aiohttp.ClientSession,
    prompts: Sequence[Prompt],
) -> Fitted:
    fitting: list[Prompt] = []
    tokens: list[list[int]] = []
    limit, vocabulary = await _vocabulary(target, session)
    # Two salts at least, to see what two prompts always have in common.
    count = max(2, len(prompts))
    salted = unique_prompts(prompts, count, seed, "fitting", vocabulary=vocabulary)
    for index, prompt in enumerate(salted):
        length = prompt.random_tokens
        if length is None:
            found = await _tokenize(session, target, prompt.body)
            tokens.append(found["tokens"])
            length = found["count"] + _SALT_TOKENS
        if length + (prompt.max_tokens or bench.max_tokens) <= limit:
            fitting.append(prompts[index % len(prompts)])
        if len(fitting) == bench.requests:
            break
    if not fitting:
        raise DataError(
            f"no prompt leaves room for its answer ({bench.max_tokens} tokens) within the {limit} "
            f"of {target.name}; lower bench.max_tokens or raise engine.max_model_len"
        )
    in_common = len(os.path.commonprefix(tokens)) if len(tokens) > 1 else 0
    return Fitted(fitting, in_common, vocabulary)


async def _vocabulary(
    target: Target, session: aiohttp.ClientSession
) -> tuple[int, tuple[int, ...]]:
    """The longest sequence, and tokens of plain text that random prompts can be made of."""
    words = [string.ascii_letters, string.digits, *string.ascii_letters, string.punctuation]
    body = {"prompt": " ".join(words), "add_special_tokens": False}
    found = await _tokenize(session, target, body)
    return int(found["max_model_len"]), tuple(sorted(set(found["tokens"])))


async def _tokenize(
    session: aiohttp.ClientSession, target: Target, body: dict[str, object]
) -> dict[str, Any]:
    async with session.post(
        f"{target.root}/tokenize", json={"model": target.model, **body}
    ) as response:
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


def _forced(model: str, max_tokens: int) -> dict[str, object]:
    """Exactly `max_tokens` of answer, and usage with every piece of it."""
    return {
        "model": model,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
