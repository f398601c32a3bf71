"""The HTTP side: who may ask, what is ready, and bytes passed through to the engine unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
from aiohttp import web

from tunesmith.serve.errors import error_body, error_response, shape_errors
from tunesmith.serve.supervisor import Supervisor

_LARGEST_BODY_BYTES = 32 * 2**20
_RETRY_AFTER_S = "5"
_TO_ENGINE = ("Content-Type", "Accept", "X-Request-Id")
_TO_CLIENT = ("Content-Type", "X-Request-Id", "Retry-After", "Cache-Control")
_EVENTS = "text/event-stream"
_LOST = "the engine stopped before the answer was complete; send the request again"


class Gateway:
    """One model behind the OpenAI API."""

    def __init__(
        self, supervisor: Supervisor, *, model_name: str, artifact_id: str, api_key: str | None
    ) -> None:
        self._supervisor = supervisor
        self._model_name = model_name
        self._artifact_id = artifact_id
        self._api_key = api_key.encode() if api_key else None
        self._created = int(time.time())
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._engine: aiohttp.ClientSession
        self.requests = 0
        """Requests that reached the engine."""

    def app(self) -> web.Application:
        """The routes; everything else is an error in OpenAI's shape."""
        app = web.Application(middlewares=[shape_errors], client_max_size=_LARGEST_BODY_BYTES)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._models)
        app.router.add_route("*", "/v1/{path:.+}", self._forward)
        app.on_response_prepare.append(self._name_artifact)
        app.cleanup_ctx.append(self._session)
        return app

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and let the open ones end; whether all did."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    async def _session(self, _app: web.Application) -> AsyncIterator[None]:
        # Answers take as long as they take; the engine itself is watched by its process.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        ) as self._engine:
            yield

    async def _name_artifact(self, _request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-tunesmith-artifact"] = self._artifact_id

    async def _healthz(self, _request: web.Request) -> web.Response:
        """Whether this process answers."""
        return web.json_response({"status": "ok"})

    async def _readyz(self, _request: web.Request) -> web.Response:
        """Whether a request sent now would be answered."""
        refusal = self._not_ready()
        return refusal or web.json_response({"status": "ready", "model": self._model_name})

    async def _models(self, request: web.Request) -> web.Response:
        if refusal := self._refused(request):
            return refusal
        model = {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tunesmith",
        }
        asked = request.match_info.get("model")
        if asked is None:
            return web.json_response({"object": "list", "data": [model]})
        if asked == self._model_name:
            return web.json_response(model)
        message = f"no model {asked!r} here; there is {self._model_name!r}"
        return error_response(404, message, "model_not_found")

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        """Pass one request to the engine and its answer back, chunk by chunk as it comes."""
        if refusal := self._refused(request) or self._not_ready():
            return refusal
        with self._counted():
            body = await request.read()
            url = f"{self._supervisor.server.url}/{request.match_info['path']}"
            headers = {
                name: request.headers[name] for name in _TO_ENGINE if name in request.headers
            }
            try:
                answer = await self._engine.request(
                    request.method, url, params=request.query, data=body, headers=headers
                )
            except aiohttp.ClientError:
                return _lost()
            async with answer:
                return await _relay(request, answer)

    def _refused(self, request: web.Request) -> web.Response | None:
        """The answer to a request without the right key."""
        if self._api_key is None:
            return None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._api_key)
        if is_right and scheme.lower() == "bearer":
            return None
        message = "a wrong API key, or none; send it as: Authorization: Bearer KEY"
        return error_response(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _not_ready(self) -> web.Response | None:
        """The answer while there is no engine to ask, or no longer one for new requests."""
        if self._is_draining:
            message, code = "the server is shutting down", "shutting_down"
        elif not self._supervisor.is_ready:
            message, code = f"{self._model_name} is being loaded; try again soon", "loading"
        else:
            return None
        return error_response(503, message, code, {"Retry-After": _RETRY_AFTER_S})

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.requests += 1
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()


async def _relay(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """The engine's answer to the client, each piece as soon as it is there."""
    headers = {name: answer.headers[name] for name in _TO_CLIENT if name in answer.headers}
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = answer.content_length
    try:
        first = await answer.content.readany()
    except aiohttp.ClientError:
        return _lost()
    await response.prepare(request)
    await response.write(first)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientPayloadError:
        if answer.content_type != _EVENTS:
            # The client knows the length, so a closed connection tells it.
            if request.transport:
                request.transport.abort()
            return response
        event = json.dumps(error_body(502, _LOST, "engine_unavailable"))
        await response.write(f"data: {event}\n\n".encode())
    await response.write_eof()
    return response


def _lost() -> web.Response:
    return error_response(502, _LOST, "engine_unavailable", {"Retry-After": _RETRY_AFTER_S})
