"""The gateway before a small upstream that does what an engine can do to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from gateways import ARTIFACT, asynchronous, before

from tunesmith.serve.gateway import Gateway


@dataclass
class Engine:
    """What the gateway asks of its supervisor, with an upstream of our own behind it."""

    url: str = ""
    is_ready: bool = True
    seen: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def server(self) -> Engine:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.method, request.path_qs, body, dict(request.headers)))
        match request.path:
            case "/v1/echo":
                return web.Response(body=body, content_type="application/json", status=418)
            case "/v1/die":
                assert request.transport
                request.transport.abort()
                return web.Response()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        if request.path == "/v1/die-later":
            assert request.transport
            request.transport.abort()
            return response
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def running(
    api_key: str | None = None,
) -> AsyncIterator[tuple[Engine, Gateway, aiohttp.ClientSession]]:
    engine = Engine()
    async with before(engine, engine.answer, api_key=api_key) as (served, client):
        yield engine, served.gateway, client


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error of a response, in the one shape there is."""
    assert response.headers["x-tunesmith-artifact"] == ARTIFACT
    error: dict[str, Any] = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@asynchronous
async def test_bytes_go_through_unchanged_both_ways() -> None:
    body = json.dumps({"model": "bot", "prompt": "é", "odd": [1.0, None]}).encode()
    async with running() as (engine, gateway, client):
        headers = {"Content-Type": "application/json", "Authorization": "Bearer x", "Cookie": "a"}
        async with client.post(
            "/v1/echo?a=1&a=2&b=%C3%A9%26", data=body, headers=headers
        ) as response:
            assert response.status == 418 and await response.read() == body
            assert response.headers["x-tunesmith-artifact"] == ARTIFACT
        method, path, sent, passed = engine.seen[0]
        assert (method, path, sent) == ("POST", "/v1/echo?a=1&a=2&b=%C3%A9%26", body)
        assert passed["Content-Type"] == "application/json"
        assert "Authorization" not in passed and "Cookie" not in passed
        assert gateway.requests == 1


@asynchronous
async def test_a_stream_arrives_piece_by_piece() -> None:
    async with running() as (engine, _, client), client.post("/v1/stream") as response:
        assert response.content_type == "text/event-stream"
        assert await response.content.readany() == b"data: one\n\n"
        engine.release.set()
        assert await response.content.read() == b"data: [DONE]\n\n"


@asynchronous
async def test_a_client_that_leaves_ends_its_request_in_the_engine() -> None:
    async with running() as (engine, gateway, client):
        async with client.post("/v1/stream") as response:
            await response.content.readany()
        await asyncio.wait_for(engine.cancelled.wait(), 5)
        assert await gateway.drain(5)


@asynchronous
async def test_a_lost_engine_is_an_error_and_never_a_short_answer() -> None:
    async with running() as (engine, _, client):
        async with client.post("/v1/die") as response:
            assert response.status == 502 and response.headers["Retry-After"]
            assert (await error_of(response))["code"] == "engine_unavailable"
        async with client.post("/v1/die-later") as response:
            text = await response.text()
            assert text.startswith("data: one\n\n") and "[DONE]" not in text
            event = json.loads(text.removeprefix("data: one\n\ndata: "))
            assert event["error"]["code"] == "engine_unavailable"
        engine.url = "http://127.0.0.1:9/v1"
        async with client.post("/v1/echo") as response:
            assert response.status == 502


@asynchronous
async def test_the_key_decides_and_probes_need_none() -> None:
    async with running(api_key="sécret") as (engine, _, client):
        for given in (None, "sécret", "Bearer", "Bearer secret", "Basic sécret", "Bearer sécret2"):
            headers = {"Authorization": given} if given else {}
            for path in ("/v1/echo", "/v1/models"):
                async with client.get(path, headers=headers) as response:
                    assert response.status == 401, given
                    assert (await error_of(response))["code"] == "invalid_api_key"
        assert engine.seen == []
        for path in ("/healthz", "/readyz"):
            async with client.get(path) as response:
                assert response.status == 200
        async with client.get("/v1/echo", headers={"Authorization": "Bearer sécret"}) as response:
            assert response.status == 418


@asynchronous
async def test_without_an_engine_requests_wait_outside() -> None:
    async with running() as (engine, _, client):
        engine.is_ready = False
        for path in ("/v1/echo", "/readyz"):
            async with client.get(path) as response:
                assert response.status == 503 and int(response.headers["Retry-After"]) > 0
                assert (await error_of(response))["code"] == "loading"
        for path in ("/healthz", "/v1/models", "/v1/models/bot"):
            async with client.get(path) as response:
                assert response.status == 200
        async with client.get("/v1/models/other") as response:
            assert response.status == 404
            assert (await error_of(response))["code"] == "model_not_found"


@asynchronous
async def test_drain_lets_open_streams_end_and_turns_others_away_at_once() -> None:
    async with running() as (engine, gateway, client), client.post("/v1/stream") as response:
        await response.content.readany()
        draining = asyncio.create_task(gateway.drain(20))
        await asyncio.sleep(0)
        started_s = time.monotonic()
        for path in ("/readyz", "/v1/echo"):
            async with client.get(path) as refused:
                assert refused.status == 503
                assert (await error_of(refused))["code"] == "shutting_down"
        assert time.monotonic() - started_s < 0.1
        assert not draining.done()
        engine.release.set()
        assert await response.content.read() == b"data: [DONE]\n\n"
        assert await draining


@asynchronous
async def test_a_drain_ends_when_its_time_is_over() -> None:
    async with running() as (_, gateway, client), client.post("/v1/stream") as response:
        await response.content.readany()
        assert not await gateway.drain(0.05)


@asynchronous
async def test_odd_requests_get_errors_in_the_same_shape() -> None:
    async with running() as (_, _, client):
        for method, path, status in [
            ("GET", "/nope", 404),
            ("POST", "/healthz", 405),
        ]:
            async with client.request(method, path) as response:
                assert response.status == status
                await error_of(response)
        async with client.post("/v1/echo", data=b"x" * (33 * 2**20)) as response:
            assert response.status == 413
            assert "too large" in (await error_of(response))["message"]
