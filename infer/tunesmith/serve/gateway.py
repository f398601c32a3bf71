"""The HTTP side: who may ask, what is ready, and which upstreams a request goes to."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from aiohttp import web

from tunesmith.serve.background import Shadows
from tunesmith.serve.client import Client
from tunesmith.serve.errors import SERVER, ApiError, shape_errors
from tunesmith.serve.feedback.api import add_feedback
from tunesmith.serve.forward import forward
from tunesmith.serve.front.intake import check_body, check_path, read_body
from tunesmith.serve.front.openapi import document
from tunesmith.serve.govern.governance import Governance, Visit
from tunesmith.serve.govern.keys import Key
from tunesmith.serve.govern.usage import Ask, read_ask
from tunesmith.serve.page.api import add_page, describe
from tunesmith.serve.page.live import Live
from tunesmith.serve.relay import RETRY_AFTER_S
from tunesmith.serve.rollout.record import Rollout
from tunesmith.serve.routes import Route, Tables
from tunesmith.serve.upstream import held

_MIB = 2**20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_RELOAD_INTERVAL_S = 0.5
_VISIT = web.RequestKey("visit", Visit)
_UNREAD = Ask(b"")


class Gateway:
    """Models behind the OpenAI API."""

    def __init__(
        self,
        tables: Tables,
        governance: Governance,
        *,
        api_key: str | None = None,
        asks_keys: bool = False,
        max_open_requests: int = 0,
    ) -> None:
        self._tables = tables
        self.governance = governance
        self._shadows = Shadows(governance)
        self._api_key = api_key.encode() if api_key else None
        self._asks_keys = asks_keys
        self._max_open = max_open_requests
        self._created = int(time.time())
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._live = Live()
        governance.observers.append(self._live.observe)
        self._client: Client
        self.rollout_of: Callable[[str], Rollout | None] = lambda _: None
        """The rollout that a route is in, for the page."""
        self.requests = 0
        """Requests that were taken."""

    def app(self) -> web.Application:
        """The routes; everything else is an error in OpenAI's shape."""
        section = self.governance.section
        app = web.Application(
            middlewares=[shape_errors(self._refused)],
            client_max_size=section.max_body_mib * _MIB,
        )
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/openapi.json", self._openapi)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._models)
        add_feedback(app, self.governance, self._caller)
        asks_key = self._api_key is not None or self._asks_keys
        add_page(app, self._live, caller=self._caller, asks_key=asks_key, server=self._state)
        app.router.add_route("*", "/v1/{path:.+}", self._forward)
        app.on_response_prepare.append(self._name_artifact)
        app.cleanup_ctx.extend(
            (self._noting, self._upstreams, self._shadows.ending, self._fresh_keys)
        )
        return app

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and let the open ones end; whether all did."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    async def _noting(self, _app: web.Application) -> AsyncIterator[None]:
        """Leave nothing that has ended out of the log."""
        yield
        self.governance.note()

    async def _upstreams(self, _app: web.Application) -> AsyncIterator[None]:
        async with Client() as self._client:
            yield

    async def _fresh_keys(self, _app: web.Application) -> AsyncIterator[None]:
        """Learn of keys that are made or revoked while this runs."""

        async def reload() -> None:
            while True:
                await asyncio.sleep(_RELOAD_INTERVAL_S)
                await asyncio.to_thread(self.governance.reload)

        task = asyncio.create_task(reload()) if self._asks_keys else None
        yield
        if task:
            task.cancel()

    async def _name_artifact(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say what answered, where one thing did or would have."""
        response.headers["Server"] = SERVER
        response.headers["X-Content-Type-Options"] = "nosniff"
        visit: Visit | None = request.get(_VISIT)
        if arm := visit.arm if visit else self._tables.table.sole:
            response.headers["x-tunesmith-artifact"] = arm.artifact_id
        if visit and visit.route and arm:
            response.headers["x-tunesmith-route"] = visit.route
            response.headers["x-tunesmith-arm"] = arm.name

    def _refused(self, request: web.Request, status: int) -> None:
        """Log what was refused before it became a visit, which logs itself."""
        if _VISIT not in request:
            self.governance.refused(request.method, request.path, status)

    async def _openapi(self, _request: web.Request) -> web.Response:
        """What this server offers, for tools that read it; it tells nothing of the model."""
        return web.json_response(document())

    async def _healthz(self, _request: web.Request) -> web.Response:
        """Whether this process answers."""
        return web.json_response({"status": "ok"})

    def _state(self) -> dict[str, Any]:
        """What the page shows of this server."""
        return describe(self._tables.table, self.rollout_of) | {
            "is_draining": self._is_draining,
            "open": self._open,
            "requests": self.requests,
        }

    async def _readyz(self, _request: web.Request) -> web.Response:
        """Whether a request sent now would be answered, whatever model it asks for."""
        table = self._tables.table
        self._check_ready(*table.routes.values())
        names = list(table.routes)
        return web.json_response({"status": "ready", "model": names[0], "models": names})

    async def _metrics(self, request: web.Request) -> web.Response:
        """For Prometheus, which can be given a key to send."""
        self._caller(request)
        table = self._tables.table
        self.governance.note()
        is_ready = not self._is_draining and all(map(table.is_ready, table.routes.values()))
        text = self.governance.metrics.text(
            open_requests=self._open, is_ready=is_ready, upstreams=table.upstreams.values()
        )
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, request: web.Request) -> web.Response:
        self._caller(request)
        models = {
            name: {"id": name, "object": "model", "created": self._created, "owned_by": "tunesmith"}
            for name in self._tables.table.routes
        }
        asked = request.match_info.get("model")
        if asked is None:
            return web.json_response({"object": "list", "data": list(models.values())})
        if asked in models:
            return web.json_response(models[asked])
        raise self._unknown(asked)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        """Pass one request to an upstream and its answer back, piece by piece as it comes."""
        given = request.headers.get("X-Request-Id")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, request.method, request.match_info["path"], None, _UNREAD)
        visit.arm = self._tables.table.sole
        request[_VISIT] = visit
        with self.governance.visit(visit):
            check_path(visit.path)
            visit.key = self._caller(request)
            self._check_ready()
            self._check_room()
            with self._counted():
                timeout_s = self.governance.section.read_timeout_s
                visit.ask = read_ask(visit.path, await read_body(request, timeout_s))
                check_body(visit.path, visit.ask)
                return await self._answer(request, visit)

    async def _answer(self, request: web.Request, visit: Visit) -> web.StreamResponse:
        table = self._tables.table
        route = table.find(visit.ask.model)
        if route is None:
            raise self._unknown(str(visit.ask.model))
        self._check_ready(route)
        visit.route = route.name
        if screen := self.governance.rails.of(route.name):
            visit.screen = screen
            visit.ask = await screen.enter(visit.path, visit.method, visit.ask)
            # What was there before the wait may be unloaded by now.
            table = self._tables.table
            route = table.routes[route.name]
        upstreams = table.arms(route.order(route.choose(_identity(visit, route))))
        visit.first = visit.arm = upstreams[0]
        with held(upstreams):
            if visit.key:
                ready = [one for one in upstreams if one.place.is_ready]
                lengths = {one.name: (one, await one.model_len(self._client)) for one in ready}
                await self.governance.admit(visit, lengths)
            response = await forward(
                self._client,
                request,
                visit,
                upstreams,
                timeout_s=route.timeout_s,
                keep=self.governance.keeps_payload,
            )
        if route.shadow:
            shadow = table.upstreams[route.shadow.upstream]
            self._shadows.copy(self._client, visit, route, shadow)
        return response

    def _unknown(self, model: str) -> ApiError:
        there = ", ".join(map(repr, self._tables.table.routes))
        return ApiError(404, f"no model {model!r} here; there is {there}", "model_not_found")

    def _caller(self, request: web.Request) -> Key | None:
        """The key that a request shows; None where it needs none. Raises ApiError on others."""
        if self._api_key is None and not self._asks_keys:
            return None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            text = given.strip()
            if self._api_key and hmac.compare_digest(
                text.encode("utf-8", "replace"), self._api_key
            ):
                return None
            if self._asks_keys and (key := self.governance.find(text)):
                return key
        message = "a wrong API key, or none; send it as: Authorization: Bearer KEY"
        raise ApiError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _check_ready(self, *routes: Route) -> None:
        """Raises ApiError while nobody is there to ask, for each of the routes or for any at all,
        or no longer for new requests."""
        table = self._tables.table
        is_ready = (
            all(map(table.is_ready, routes))
            if routes
            else any(one.place.is_ready for one in table.upstreams.values())
        )
        if self._is_draining:
            message, code = "the server is shutting down", "shutting_down"
        elif not is_ready:
            loading = [route.name for route in routes or table.routes.values()]
            message, code = f"{', '.join(loading)} is being loaded; try again soon", "loading"
        else:
            return
        raise ApiError(503, message, code, {"Retry-After": RETRY_AFTER_S})

    def _check_room(self) -> None:
        """Raises ApiError while as many requests are open as may be: to wait helps nobody."""
        if self._max_open and self._open >= self._max_open:
            message = f"{self._open} requests are open, as many as may be; try again soon"
            raise ApiError(429, message, "overloaded", {"Retry-After": "1"})

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


def _identity(visit: Visit, route: Route) -> str | None:
    """Whose requests stay together."""
    if route.sticky == "key":
        return visit.key.id if visit.key else None
    user = visit.ask.fields.get("user") if route.sticky == "user" else None
    return user if isinstance(user, str) and user else None
