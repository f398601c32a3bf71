"""The engines and adapters of a gateway, and which routes lead to them.

It alone changes the routing table, which is replaced whole: a request sees the old one or the new.
What is to answer is loaded before a route leads to it, and let go when no route does and its last
request has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tunesmith.config import TunesmithError
from tunesmith.serve.client import Client
from tunesmith.serve.pins import Pin, unpin
from tunesmith.serve.routes import Route, Table
from tunesmith.serve.supervisor import Supervisor
from tunesmith.serve.upstream import Attached, Load, Upstream
from tunesmith.terminal import log

Arms = tuple[tuple[str, float], ...]


@dataclass
class EngineHost:
    """One supervised engine, and the adapters that it holds."""

    supervisor: Supervisor
    load: Load
    model_id: str
    """Artifact of the whole model that it runs."""

    template: str | None = None
    """The chat template that it was started with, where that is not the tokenizer's own."""

    adapters: dict[str, Pin] = field(default_factory=dict)
    """By the names that the engine knows them by."""

    is_starting: bool = False


class Fleet:
    """Lives on one event loop."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        upstreams: Mapping[str, Upstream],
        engines: Mapping[str, EngineHost],
        *,
        declared: frozenset[str] = frozenset(),
    ) -> None:
        self.table = Table(dict(routes), dict(upstreams))
        self.engines = dict(engines)
        """By the name of the upstream that they were made for."""
        self.became_ready = asyncio.Event()
        """Set once every engine that the gateway was started with has answered."""
        self._declared = declared
        self._restarts_of_gone = 0
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def restarts(self) -> int:
        """Of all engines together."""
        there = sum(host.supervisor.restarts for host in self.engines.values())
        return there + self._restarts_of_gone

    async def run(self) -> None:
        """Start everything, then go on until cancelled. Raises the error of the first engine that
        never became ready."""
        async with Client() as client:
            for one in self.table.upstreams.values():
                if isinstance(one.place, Attached):
                    watch = one.place.watch(client, one)
                    self._watchers.append(asyncio.create_task(watch))
            # One after another: each measures the memory that is free when it starts.
            for host in list(self.engines.values()):
                await _start(host)
            self.became_ready.set()
            await asyncio.Event().wait()

    async def stop(self) -> None:
        """End all engines."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*(host.supervisor.stop() for host in self.engines.values()))

    async def add_adapter(self, host: EngineHost, upstream: Upstream, pinned: Pin) -> None:
        """Load an adapter and make it an upstream. Raises ModelError where it does not fit."""
        if upstream.name not in self.table.upstreams:
            server = host.supervisor.server
            await asyncio.to_thread(server.add_adapter, upstream.model, pinned.folder)
            host.adapters[upstream.model] = pinned
            self.include(upstream)

    async def add_engine(self, host: EngineHost, upstream: Upstream) -> None:
        """Start an engine beside the others and make it an upstream. Raises the engine's error
        when it does not start; then nothing has changed."""
        if upstream.name in self.table.upstreams:
            return
        self.engines[upstream.name] = host
        try:
            await _start(host)
        except BaseException:
            del self.engines[upstream.name]
            await host.supervisor.stop()
            raise
        self.include(upstream)

    def move(self, route: str, arms: Arms) -> None:
        """Lead a route to these upstreams, all at once."""
        table = self.table
        routes = {**table.routes, route: replace(table.routes[route], arms=arms)}
        self.table = Table(routes, table.upstreams)
        log(f"serve: {route} → {', '.join(f'{name} {weight:g}' for name, weight in arms)}")

    async def sweep(self) -> None:
        """Let go of what no route leads to and no request is open at."""
        used = {*self._declared}
        used |= {name for route in self.table.routes.values() for name in route.members}
        there = self.table.upstreams.items()
        idle = [one for name, one in there if name not in used and not one.held]
        for upstream in idle:
            await self._retire(upstream)

    def host_of(self, upstream: Upstream) -> EngineHost | None:
        """The engine that an upstream is on, where that is ours."""
        return next(
            (host for host in self.engines.values() if host.supervisor is upstream.place), None
        )

    def include(self, upstream: Upstream) -> None:
        """Make it known, so that routes can be led to it."""
        table = self.table
        self.table = Table(table.routes, {**table.upstreams, upstream.name: upstream})

    async def _retire(self, upstream: Upstream) -> None:
        table = self.table
        kept = {name: one for name, one in table.upstreams.items() if one is not upstream}
        self.table = Table(table.routes, kept)
        host = self.host_of(upstream)
        if host is None:
            return
        if any(one.place is upstream.place for one in kept.values()):
            if pinned := host.adapters.pop(upstream.model, None):
                server = host.supervisor.server
                try:
                    await asyncio.to_thread(server.remove_adapter, upstream.model)
                except TunesmithError as error:
                    log(f"serve: {upstream.name} stays loaded: {error}")
                unpin(pinned)
                log(f"serve: {upstream.name} is unloaded")
            return
        name = next(name for name, one in self.engines.items() if one is host)
        del self.engines[name]
        self._restarts_of_gone += host.supervisor.restarts
        await host.supervisor.stop()
        for pinned in host.adapters.values():
            unpin(pinned)
        log(f"serve: {upstream.name} is stopped")


async def _start(host: EngineHost) -> None:
    """Return when an engine answers; raises the error of one that never does."""
    task = host.supervisor.start()
    ready = asyncio.ensure_future(host.supervisor.became_ready.wait())
    try:
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            task.result()
            raise asyncio.CancelledError  # it was stopped while it started
    finally:
        ready.cancel()
