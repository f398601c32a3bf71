"""A gateway, two upstreams of which one may be faulty, a load, and a rollout to that one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from gateways import behind, gateway
from sqlalchemy.engine import Engine

from tunesmith.config.schema.routes import Rollout as Section
from tunesmith.serve.fleet import Fleet
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.rollout.decide import Plan
from tunesmith.serve.rollout.probes import Probe
from tunesmith.serve.rollout.record import Rollout, read_decisions, read_rollouts
from tunesmith.serve.rollout.runner import Rollouts
from tunesmith.serve.routes import Route
from tunesmith.serve.upstream import Upstream

SPREAD = 0.3
PROBES = tuple(Probe(prompt=f"{at} plus 1 is", exact=str(at + 1)) for at in range(20))


@dataclass
class Arm:
    """An upstream that takes some milliseconds, more or less, and may be worse than it seems."""

    name: str
    seconds: float = 0.02
    error_rate: float = 0.0
    slowness: float = 1.0
    is_wrong: bool = False
    tokens: int = 5
    url: str = ""
    is_ready: bool = True
    random: random.Random = field(default_factory=random.Random)
    answered: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        await asyncio.sleep(self.seconds * self.slowness * self.random.lognormvariate(0, SPREAD))
        self.answered += 1
        prompt = str(body["prompt"])
        is_probe = prompt.endswith(" plus 1 is")
        if not is_probe and self.random.random() < self.error_rate:
            return web.json_response({"error": {"message": "no"}}, status=500)
        text = str(int(prompt.split()[0]) + 1) if is_probe and not self.is_wrong else "dunno"
        return web.json_response(
            {
                "id": self.name,
                "choices": [{"index": 0, "text": text, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 4, "completion_tokens": self.tokens},
            }
        )


@dataclass
class Outcome:
    """What came of a rollout."""

    rollout: Rollout
    decisions: list[dict[str, Any]]
    seconds: float
    requests: int
    failed: int
    """Requests that a client saw fail."""

    after_minimum_s: float | None
    """From the moment that both arms had the smallest number of requests to the end."""


async def play(
    old: Arm, new: Arm, section: Section, *, probes: tuple[Probe, ...] = PROBES,
    longest_s: float = 120.0, clients: int = 12, seed: int = 17,
) -> Outcome:  # fmt: skip
    """Roll out `new` in place of `old` under a closed loop, until it is decided or time is up."""
    old.random, new.random = random.Random(seed), random.Random(seed + 1)
    price = TokenPrice(1.0, 2.0, "a test")
    async with contextlib.AsyncExitStack() as stack:
        for arm in (old, new):
            arm.url = await stack.enter_async_context(behind(arm.answer))
        upstreams = {
            arm.name: Upstream(arm.name, "bot", arm, f"checkpoint-{arm.name}", price=price)
            for arm in (old, new)
        }
        route = Route("bot", ((old.name, 1.0),))
        fleet = Fleet({"bot": route}, upstreams, {}, declared=frozenset(upstreams))
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served, client = await stack.enter_async_context(gateway(fleet, store=store))
        plan = Plan.of(section, len(probes))
        rollouts = Rollouts(fleet, served.governance, served.database, plan, probes)
        running = asyncio.create_task(rollouts.run())
        await rollouts.start("bot", new.name)
        load = _Load(client, rollouts, plan.min_requests)
        workers = [asyncio.create_task(load.work(at, seed)) for at in range(clients)]
        deadline_s = time.monotonic() + longest_s
        while rollouts.running("bot") and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        ended_s = time.monotonic()
        load.is_over = True
        await asyncio.gather(*workers)
        # A route is moved first and the move recorded after it.
        while not rollouts.running("bot") and _last(served.database).state == "running":
            await asyncio.sleep(0.02)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        enough_s = load.enough_s
        return Outcome(
            _last(served.database),
            read_decisions(served.database, _last(served.database)),
            ended_s - load.started_s,
            load.requests,
            load.failed,
            None if enough_s is None else ended_s - enough_s,
        )


class _Load:
    """Clients that ask again as soon as they have an answer."""

    def __init__(self, client: aiohttp.ClientSession, rollouts: Rollouts, least: int) -> None:
        self._client, self._rollouts, self._least = client, rollouts, least
        self.started_s = time.monotonic()
        self.enough_s: float | None = None
        self.is_over, self.requests, self.failed = False, 0, 0

    async def work(self, number: int, seed: int) -> None:
        drawn = random.Random(f"{seed} {number}")
        while not self.is_over:
            body = {"model": "bot", "prompt": "say", "max_tokens": 5}
            body["user"] = f"user {drawn.randrange(10**9)}"
            async with self._client.post("/v1/completions", json=body) as response:
                await response.read()
            self.requests += 1
            self.failed += response.status != 200
            rollout = self._rollouts.running("bot")
            if self.enough_s is None and rollout and rollout.step == 0:
                seen = rollout.evidence
                if min(seen.requests, seen.baseline_requests) >= self._least:
                    self.enough_s = time.monotonic()


def _last(database: Engine) -> Rollout:
    return read_rollouts(database, "bot", last=1)[0]
