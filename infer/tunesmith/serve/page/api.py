"""`/ui` and `/ui/state`: a page of static files, and what it shows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from aiohttp import web

from tunesmith.serve.govern.keys import Key
from tunesmith.serve.page.live import Live, total_usd
from tunesmith.serve.rollout.record import Rollout
from tunesmith.serve.routes import Table

_FILES = {
    "style.css": "text/css",
    "app.js": "text/javascript",
    "common.js": "text/javascript",
    "live.js": "text/javascript",
    "playground.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_ASKS_KEY = 'data-asks-key="false"'


def add_page(
    app: web.Application,
    live: Live,
    *,
    caller: Callable[[web.Request], Key | None],
    asks_key: bool,
    server: Callable[[], dict[str, Any]],
) -> None:
    """Serve the page. Its files tell nothing; its state is for those who have a key."""

    async def state(request: web.Request) -> web.Response:
        key = caller(request)
        found = live.state(key.id if key else None)
        found["usd"] = total_usd(found["costs"])
        headers = {"Cache-Control": "no-store"}
        return web.json_response(found | {"server": server()}, headers=headers)

    files = resources.files(__package__) / "static"
    page = (files / "index.html").read_text(encoding="utf-8")
    if asks_key:
        page = page.replace(_ASKS_KEY, _ASKS_KEY.replace("false", "true"))
    for path in ("/ui", "/ui/"):
        app.router.add_get(path, _sender(page, "text/html"))
    for name, kind in _FILES.items():
        text = (files / name).read_text(encoding="utf-8")
        app.router.add_get(f"/ui/{name}", _sender(text, kind))
    app.router.add_get("/ui/state", state)


def _sender(text: str, kind: str) -> Callable[[web.Request], Any]:
    async def send(_request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=_HEADERS)

    return send


def describe(table: Table, rollout_of: Callable[[str], Rollout | None]) -> dict[str, Any]:
    """The models and routes of a gateway, and the rollouts that these are in, for the page."""
    return {
        "upstreams": [
            {
                "name": one.name,
                "model": one.model,
                "artifact": one.artifact_id,
                "is_ready": one.place.is_ready,
                "open": one.open,
                "input_usd_per_million_tokens": (
                    one.price.input_usd_per_million_tokens if one.price else None
                ),
                "output_usd_per_million_tokens": (
                    one.price.output_usd_per_million_tokens if one.price else None
                ),
            }
            for one in table.upstreams.values()
        ],
        "routes": [
            {
                "name": route.name,
                "is_ready": table.is_ready(route),
                "arms": [{"name": name, "weight": weight} for name, weight in route.arms],
                "fallback": list(route.fallback),
                "shadow": route.shadow.upstream if route.shadow else None,
                "rollout": _rollout(rollout_of(route.name)),
            }
            for route in table.routes.values()
        ],
    }


def _rollout(found: Rollout | None) -> dict[str, Any] | None:
    if found is None:
        return None
    evidence = found.evidence
    return {
        "candidate": found.candidate,
        "step": found.step + 1,
        "steps": len(found.plan.shares),
        "share": found.share,
        "requests": evidence.requests,
        "errors": evidence.errors,
        "baseline_requests": evidence.baseline_requests,
        "baseline_errors": evidence.baseline_errors,
    }
