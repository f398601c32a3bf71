"""The load generator: a process of its own, so that nothing else of this program makes it late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import aiohttp

from tunesmith.bench.client import Sample, ask, open_session
from tunesmith.bench.load import closed_loop, open_loop, pulse
from tunesmith.config import TunesmithError

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Job:
    """Requests, and when to send them."""

    urls: tuple[str, ...]
    bodies: tuple[dict[str, Any], ...]
    arrivals_s: tuple[float, ...] | None
    """Moments to send them at; None keeps `concurrency` in flight."""
    concurrency: int = 1


@dataclass(frozen=True)
class Recorded:
    """What the generator saw, of the requests and of itself."""

    samples: list[Sample]
    late_s: list[float]
    """How late it woke up, again and again."""
    cpu: float
    """Its CPU seconds per second."""
    wall_s: float


class Generator:
    """A process that plays jobs, for as long as the `with` block lasts."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._far_end,), daemon=True)

    def __enter__(self) -> Generator:
        self._process.start()
        self._far_end.close()
        if not self._pipe.poll(_START_TIMEOUT_S):
            self._process.kill()
            raise TunesmithError(f"the load generator did not start in {_START_TIMEOUT_S:.0f} s")
        self._receive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    async def play(self, job: Job) -> Recorded:
        """Send every request of a job and read every answer to its end."""
        self._pipe.send(job)
        while not self._pipe.poll():
            # Waking up is cheap, and a thread that blocks here could not be interrupted.
            await asyncio.sleep(0.02)
        found = self._receive()
        assert isinstance(found, Recorded)
        return found

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise TunesmithError(
                f"the load generator ended by itself, exit code {self._process.exitcode}"
            ) from error


def _serve(pipe: Connection) -> None:
    """Play what comes through the pipe until the other end is gone."""
    # Ctrl-C is for the process that asks; it ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send("ready")
        while True:
            pipe.send(asyncio.run(_play(pipe.recv())))


async def _play(job: Job) -> Recorded:
    async with open_session() as session:
        late_s: list[float] = []
        gc.collect()
        gc.disable()
        cpu_s, origin_s = time.process_time(), time.perf_counter()
        async with pulse(late_s):
            samples = await _load(session, job, origin_s)
        wall_s = time.perf_counter() - origin_s
        cpu = (time.process_time() - cpu_s) / wall_s
        gc.enable()
    return Recorded(samples, late_s, cpu, wall_s)


async def _load(session: aiohttp.ClientSession, job: Job, origin_s: float) -> list[Sample]:
    async def send(index: int, intended_s: float) -> Sample:
        return await ask(
            session,
            job.urls[index],
            job.bodies[index],
            index=index,
            intended_s=intended_s,
            origin_s=origin_s,
        )

    if job.arrivals_s is None:
        return await closed_loop(send, len(job.bodies), job.concurrency, origin_s)
    return await open_loop(send, job.arrivals_s, origin_s)
