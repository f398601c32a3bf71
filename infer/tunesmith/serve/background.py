"""Requests that no client waits for: copies for a second model, and the questions of a rollout."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

from aiohttp import web

from tunesmith.serve.client import Answer, Client, LostError
from tunesmith.serve.govern.governance import Governance, Visit
from tunesmith.serve.govern.usage import EventReader, read_answer
from tunesmith.serve.routes import Route
from tunesmith.serve.upstream import Upstream, held

_LARGEST_ANSWER_BYTES = 16 * 2**20
_MOST_SHADOWS = 8


async def ask(client: Client, governance: Governance, visit: Visit, upstream: Upstream) -> bytes:
    """The whole answer of one upstream; empty where there is none. It is logged like any other."""
    visit.first = visit.arm = upstream
    with governance.visit(visit), held([upstream]), upstream.taken():
        visit.is_sent, visit.tried = True, 1
        try:
            with await client.ask(
                visit.method,
                f"{upstream.place.url}/{visit.path}",
                headers={**upstream.headers, "Content-Type": "application/json"},
                body=visit.ask.sent(upstream.model, to_vllm=upstream.is_vllm),
            ) as answer:
                whole = await _read(answer, visit)
        except LostError:
            visit.status, visit.ending = 502, "lost"
            return b""
        visit.status = answer.status
        visit.ending = "error" if answer.status >= 400 or visit.usage.error else "complete"
        visit.answer = whole if governance.keeps_payload else b""
        return whole if visit.ending == "complete" else b""


async def _read(answer: Answer, visit: Visit) -> bytes:
    whole = bytearray()
    reader = EventReader(visit.ask, visit.usage) if visit.ask.is_stream else None
    while piece := await answer.read():
        passed = reader.feed(piece) if reader else piece
        if len(whole) < _LARGEST_ANSWER_BYTES:
            whole += passed
    if reader is None:
        read_answer(bytes(whole), visit.usage)
    return bytes(whole)


class Shadows:
    """Copies requests after their own answers have gone out, while the second model has room."""

    def __init__(self, governance: Governance) -> None:
        self._governance = governance
        self._open: set[asyncio.Task[bytes]] = set()

    def copy(self, client: Client, visit: Visit, route: Route, upstream: Upstream) -> None:
        """Ask `upstream` the same, or count that it was too busy."""
        shadow = route.shadow
        if shadow is None or visit.ending != "complete" or not visit.ask.fields:
            return
        if random.random() >= shadow.share:
            return
        if not upstream.has_spare or len(self._open) >= _MOST_SHADOWS:
            self._governance.metrics.drop_shadow(route.name)
            return
        copied = Visit(f"{visit.request_id}.shadow", visit.method, visit.path, None, visit.ask)
        copied.route, copied.purpose = route.name, "shadow"
        copied.experiment = f"shadow of {route.name}"
        task = asyncio.create_task(ask(client, self._governance, copied, upstream))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def ending(self, _app: web.Application) -> AsyncIterator[None]:
        """Leave none behind."""
        yield
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
