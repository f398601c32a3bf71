"""A gateway before an upstream of the test's own."""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer
from sqlalchemy.engine import Engine

from tunesmith.config.schema.serve import Serve
from tunesmith.serve.front.connection import Site
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.govern.archive import read_log
from tunesmith.serve.govern.database import open_gateway, requests
from tunesmith.serve.govern.governance import Governance
from tunesmith.serve.govern.journal import Journal
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.routes import Route, Table
from tunesmith.serve.upstream import Upstream

ARTIFACT = "checkpoint-0123456789ab"


@dataclass
class Served:
    """What a test may look at behind the HTTP side."""

    gateway: Gateway
    governance: Governance
    journal: Journal
    database: Engine
    folder: Path

    def settle(self) -> None:
        """Wait until all that has ended is in the log."""
        self.governance.note()
        while self.journal.is_behind:
            time.sleep(0.005)

    def lines(self) -> list[dict[str, Any]]:
        """The request log."""
        self.settle()
        names = [column.name for column in requests.columns]
        found: list[dict[str, Any]] = read_log(self.database, self.folder, names).to_pylist()
        return found


@dataclass
class Fixed:
    """Routes that stay, or move when a test moves them."""

    table: Table


@asynccontextmanager
async def listening(
    gateway: Gateway,
    *,
    head_timeout_s: float = 30.0,
    write_timeout_s: float = 30.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """The port of a gateway behind the connections that `tunesmith serve` uses."""
    runner = web.AppRunner(gateway.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    site = Site(
        runner,
        listener,
        head_timeout_s=head_timeout_s,
        write_timeout_s=write_timeout_s,
        refused=gateway.governance.refused,
        ssl_context=tls,
    )
    await site.start()
    try:
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def before(
    supervisor: Any,
    upstream: Callable[[web.Request], Awaitable[web.StreamResponse]],
    *,
    api_key: str | None = None,
    store: Path | None = None,
    price: TokenPrice | None = None,
    prepare: Callable[[Engine], None] = lambda _: None,
    **section: Any,
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession]]:
    """`supervisor` gets the `url` of the upstream; `prepare` makes keys before the gateway starts;
    `section` is that of the recipe."""
    async with behind(upstream) as url:
        supervisor.url = url
        bot = Upstream("bot", "bot", supervisor, ARTIFACT, price=price)
        table = Table({"bot": Route("bot", (("bot", 1.0),))}, {"bot": bot})
        async with gateway(
            Fixed(table), api_key=api_key, store=store, prepare=prepare, **section
        ) as found:
            yield found


@asynccontextmanager
async def behind(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """The URL of an upstream that answers so."""
    application = web.Application()
    application.router.add_route("*", "/v1/{path:.*}", answer)
    async with TestServer(application, handler_cancellation=True) as server:
        yield str(server.make_url("/v1"))


@asynccontextmanager
async def gateway(
    routes: Any,
    *,
    api_key: str | None = None,
    store: Path | None = None,
    prepare: Callable[[Engine], None] = lambda _: None,
    **section: Any,
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession]]:
    """A gateway over any routing table; `routes.table` is read for each request."""
    serve = Serve(**section)
    with tempfile.TemporaryDirectory() as scratch:
        folder = store or Path(scratch)
        database = open_gateway(folder)
        prepare(database)
        rows = serve.log.rows_per_file
        with Journal(database, folder / "serve", rows_per_file=rows) as journal:
            governance = Governance(serve, database, journal, routes)
            made = Gateway(
                routes,
                governance,
                api_key=api_key,
                asks_keys=serve.keys,
                max_open_requests=serve.max_open_requests,
            )
            async with (
                TestServer(made.app(), handler_cancellation=True) as front,
                aiohttp.ClientSession(str(front.make_url("/"))) as client,
            ):
                yield Served(made, governance, journal, database, folder / "serve"), client


def asynchronous(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is a coroutine, for at most thirty seconds."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__ = test.__name__
    return run
