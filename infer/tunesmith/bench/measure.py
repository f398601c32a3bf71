"""One running server, loaded phase by phase: warm-up, prompts only, full queue, arrivals."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import aiohttp

from tunesmith.bench.client import Sample, ask
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import Window, arrivals_window, full_queue_window
from tunesmith.bench.load import Send, closed_loop, open_loop, pulse
from tunesmith.bench.traffic import Prompt, poisson_arrivals, salted_prompts
from tunesmith.bench.validity import Evidence, Fault, faults
from tunesmith.config import DataError, TunesmithError
from tunesmith.config.schema.bench import Bench
from tunesmith.terminal import log

ATTEMPTS = 2  # the server being up, a doubtful phase costs little to measure once more
_SALT_TOKENS = 16  # more than a salt can take
_SETTLE_S = 0.1

Load = Callable[[Send, float], Awaitable[list[Sample]]]
FindWindow = Callable[[Sequence[Sample]], Window]


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
    """One load, and everything that tells whether to believe it."""

    evidence: Evidence
    wall_s: float
    faults: list[Fault]
    discarded: tuple[list[Fault], ...] = ()
    """The faults of earlier attempts."""


class Meter:
    """Loads one server with prompts that fit it; `open_meter` makes one."""

    def __init__(
        self,
        target: Target,
        bench: Bench,
        seed: int,
        session: aiohttp.ClientSession,
        prompts: Sequence[Prompt],
        common_prefix_tokens: int,
    ) -> None:
        self.target = target
        self.common_prefix_tokens = common_prefix_tokens
        self._bench = bench
        self._seed = seed
        self._session = session
        self._prompts = prompts

    async def warm_up(self) -> Phase:
        """Let the engine compile and fill its pools. Raises TunesmithError when nothing answers."""
        phase = await self._closed("warm-up", self._bench.concurrency, self._bench.max_tokens)
        samples = phase.evidence.samples
        if not any(sample.ok for sample in samples):
            raise TunesmithError(
                f"{self.target.name}: none of {len(samples)} requests was answered; "
                f"the first: {samples[0].error}"
            )
        return phase

    async def prompts_only(self) -> Phase:
        """The full queue asked for one token each: the time that reading the prompts takes."""
        return await self._closed("prompts", self._bench.requests, 1)

    async def full_queue(self) -> Phase:
        """`bench.concurrency` requests in flight until all are answered."""
        return await self._believable(
            "batch", lambda name: self._closed(name, self._bench.requests, self._bench.max_tokens)
        )

    async def arrivals(self) -> Phase:
        """Requests arriving at `bench.request_rate`."""
        arrivals_s = poisson_arrivals(self._bench.request_rate, self._bench.requests, self._seed)

        async def load(send: Send, origin_s: float) -> list[Sample]:
            return await open_loop(send, arrivals_s, origin_s)

        return await self._believable(
            "serve",
            lambda name: self._phase(
                name, self._bench.requests, self._bench.max_tokens, load, arrivals_window
            ),
        )

    async def _closed(self, name: str, count: int, max_tokens: int) -> Phase:
        concurrency = self._bench.concurrency

        async def load(send: Send, origin_s: float) -> list[Sample]:
            return await closed_loop(send, count, concurrency, origin_s)

        return await self._phase(
            name, count, max_tokens, load, lambda samples: full_queue_window(samples, concurrency)
        )

    async def _believable(self, name: str, measure: Callable[[str], Awaitable[Phase]]) -> Phase:
        """The first attempt without faults, else the last one."""
        discarded: tuple[list[Fault], ...] = ()
        while True:
            phase = await measure(f"{name} {len(discarded)}")
            if not phase.faults or len(discarded) + 1 == ATTEMPTS:
                return replace(phase, discarded=discarded)
            log(f"{self.target.name}: {name} is measured again: {phase.faults[0].detail}")
            discarded += (phase.faults,)

    async def _phase(
        self, name: str, count: int, max_tokens: int, load: Load, find_window: FindWindow
    ) -> Phase:
        """Salt prompts for this phase alone, load the server, and gather the evidence."""
        prompts = list(salted_prompts(self._prompts, count, self._seed, name))
        before = await self._counters()
        late_s: list[float] = []
        cpu_s, origin_s = time.process_time(), time.perf_counter()

        async def send(index: int, intended_s: float) -> Sample:
            prompt = prompts[index]
            return await ask(
                self._session,
                f"{self.target.url}/{prompt.endpoint}",
                prompt.body | _forced(self.target.model, max_tokens),
                index=index,
                intended_s=intended_s,
                origin_s=origin_s,
            )

        # No bar is drawn meanwhile: its thread would make this client late.
        async with pulse(late_s):
            samples = await load(send, origin_s)
        wall_s = time.perf_counter() - origin_s
        client_cpu = (time.process_time() - cpu_s) / wall_s
        evidence = Evidence(
            samples=samples,
            asked_tokens=max_tokens,
            counted=await self._counters() - before,
            common_prefix_tokens=self.common_prefix_tokens,
            late_s=late_s,
            client_cpu=client_cpu,
            window=find_window(samples),
        )
        return Phase(evidence, wall_s, faults(evidence))

    async def _counters(self) -> Counters:
        """The engine's counters once they stand still: they trail the last token a little."""
        previous = None
        while True:
            async with self._session.get(f"{self.target.root}/metrics") as response:
                counters = Counters.parse(await response.text())
            if counters == previous:
                return counters
            previous = counters
            await asyncio.sleep(_SETTLE_S)


async def open_meter(
    target: Target,
    bench: Bench,
    seed: int,
    session: aiohttp.ClientSession,
    prompts: Sequence[Prompt],
) -> Meter:
    """A meter with the prompts that leave room for an answer; the server itself counts tokens.

    Raises DataError when none does.
    """
    fitting: list[Prompt] = []
    tokens: list[list[int]] = []
    limit = 0
    # Two salts at least, to see what two prompts always have in common.
    for index, salted in enumerate(salted_prompts(prompts, max(2, len(prompts)), seed, "fitting")):
        body = {"model": target.model, **salted.body}
        async with session.post(f"{target.root}/tokenize", json=body) as response:
            response.raise_for_status()
            answer = await response.json()
        limit = answer["max_model_len"]
        if answer["count"] + _SALT_TOKENS + bench.max_tokens <= limit:
            fitting.append(prompts[index % len(prompts)])
            tokens.append(answer["tokens"])
        if len(fitting) == bench.requests:
            break
    if not fitting:
        raise DataError(
            f"no held-out prompt leaves room for {bench.max_tokens} tokens within the {limit} "
            f"of {target.name}; lower bench.max_tokens or raise engine.max_model_len"
        )
    return Meter(target, bench, seed, session, fitting, len(os.path.commonprefix(tokens)))


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
