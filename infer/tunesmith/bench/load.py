"""Two ways to load a server: arrivals at given moments, and a fixed number in flight."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from tunesmith.bench.client import Sample

Send = Callable[[int, float], Coroutine[Any, Any, Sample]]
"""Sends request `index`, intended for the given second of the phase."""

_PULSE_S = 0.05


async def open_loop(send: Send, arrivals_s: Sequence[float], origin_s: float) -> list[Sample]:
    """Send each request at its moment, however many are still in flight."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, intended_s in enumerate(arrivals_s):
            await asyncio.sleep(max(0.0, origin_s + intended_s - time.perf_counter()))
            tasks.append(group.create_task(send(index, intended_s)))
    return [task.result() for task in tasks]


async def closed_loop(send: Send, count: int, concurrency: int, origin_s: float) -> list[Sample]:
    """Keep `concurrency` requests in flight until `count` have been sent."""
    samples: list[Sample] = []
    waiting = iter(range(count))

    async def worker() -> None:
        for index in waiting:
            samples.append(await send(index, time.perf_counter() - origin_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(worker())
    return sorted(samples, key=lambda sample: sample.index)


@contextlib.asynccontextmanager
async def pulse(late_s: list[float]) -> AsyncIterator[None]:
    """Record how late this process wakes up: a client that stalls cannot time anything."""

    async def beat() -> None:
        while True:
            due_s = time.perf_counter() + _PULSE_S
            await asyncio.sleep(_PULSE_S)
            late_s.append(max(0.0, time.perf_counter() - due_s))

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
