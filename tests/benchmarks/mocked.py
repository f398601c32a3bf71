"""A gateway and the upstream that it asks, as processes of their own, for measurements."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from tunesmith.config.schema.serve import Serve
from tunesmith.serve.front.connection import Site
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.governance import Governance
from tunesmith.serve.govern.journal import Journal
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.routes import Route, Table
from tunesmith.serve.upstream import Upstream

ARTIFACT = "checkpoint-bench"
USAGE = {"prompt_tokens": 60, "completion_tokens": 16, "total_tokens": 76}


@dataclass
class Mocked:
    """Where it answers, and its process."""

    url: str
    pid: int
    store: Path

    @property
    def rss_mib(self) -> float:
        """Memory of the gateway's process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * 4096 / 2**20


@contextmanager
def mocked(store: Path, section: Serve, *, upstream_s: float, slots: int = 0) -> Iterator[Mocked]:
    """A gateway of `section` before an upstream that takes `upstream_s` for an answer, and works
    on `slots` of them at a time (0: all)."""
    context = multiprocessing.get_context("spawn")
    behind, front = free_port(), free_port()
    workers = [
        context.Process(target=_upstream, args=(behind, upstream_s, slots), daemon=True),
        context.Process(target=run_gateway, args=(front, behind, str(store), section), daemon=True),
    ]
    for worker in workers:
        worker.start()
    found = Mocked(f"http://127.0.0.1:{front}", int(workers[1].pid or 0), store)
    try:
        for port in (behind, front):
            _wait(f"http://127.0.0.1:{port}/v1/models")
        yield found
        assert workers[1].is_alive(), "the gateway has ended"
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _upstream(port: int, upstream_s: float, slots: int) -> None:
    room = asyncio.Semaphore(slots or 10_000)
    choice = {"index": 0, "message": {"role": "assistant", "content": "It adds two numbers."}}
    whole = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "bot"}
    whole |= {"choices": [choice | {"finish_reason": "stop"}], "usage": USAGE}

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            return web.json_response({"error": {"message": "no JSON"}}, status=400)
        async with room:
            await asyncio.sleep(upstream_s)
        if body.get("stream") is not True:
            return web.json_response(whole)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in ("It", "adds", "two", "numbers."):
            delta = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
            piece = json.dumps(whole | {"choices": [delta]})
            await response.write(f"data: {piece}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})

    app = web.Application(client_max_size=2**26)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


@dataclass
class _Ready:
    """An engine that is always there."""

    url: str
    is_ready: bool = True


@dataclass
class _Routes:
    """One route that stays."""

    table: Table


def run_gateway(port: int, upstream: int, store: str, section: Serve) -> None:
    """A gateway of `section` on one port before an engine on another, until it is ended."""
    database = open_gateway(Path(store))
    price = TokenPrice(1.0, 2.0, "the measurement")
    with Journal(database, Path(store) / "serve", rows_per_file=100_000) as journal:
        place = _Ready(f"http://127.0.0.1:{upstream}/v1")
        bot = Upstream("bot", "bot", place, ARTIFACT, price=price)
        routes = _Routes(Table({"bot": Route("bot", (("bot", 1.0),))}, {"bot": bot}))
        governance = Governance(section, database, journal, routes)
        gateway = Gateway(
            routes, governance, asks_keys=section.keys, max_open_requests=section.max_open_requests
        )
        asyncio.run(_listen(gateway, port))


async def _listen(gateway: Gateway, port: int) -> None:
    runner = web.AppRunner(gateway.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    refused = gateway.governance.refused
    await Site(runner, listener, head_timeout_s=30, write_timeout_s=60, refused=refused).start()
    await asyncio.Event().wait()


def _wait(url: str) -> None:
    deadline_s = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
