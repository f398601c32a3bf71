"""What the page shows, and to whom."""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
from aiohttp import web
from gateways import ARTIFACT, asynchronous, before
from sqlalchemy.engine import Engine as Database

from tunesmith.config.schema.routes import Rollout
from tunesmith.serve.govern.governance import Visit
from tunesmith.serve.govern.journal import Entry
from tunesmith.serve.govern.keys import create_key
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.govern.usage import Ask
from tunesmith.serve.page.live import Live
from tunesmith.serve.rollout.decide import Evidence, Plan
from tunesmith.serve.rollout.record import start_rollout


class Upstream:
    url, is_ready = "", True

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})
        usage = {"prompt_tokens": 3, "completion_tokens": 4}
        return web.json_response({"id": "c-1", "choices": [{"index": 0}], "usage": usage})


@asynchronous
async def test_a_key_sees_its_own_requests_and_the_operators_key_all() -> None:
    upstream, keys = Upstream(), []

    def prepare(database: Database) -> None:
        keys.extend(create_key(database, name)[1] for name in ("ann", "ben"))

    async with before(
        upstream, upstream.answer, keys=True, api_key="operator", prepare=prepare
    ) as (served, client):

        async def state(key: str) -> dict[str, Any]:
            served.settle()
            headers = {"Authorization": f"Bearer {key}"}
            async with client.get("/ui/state", headers=headers) as response:
                assert response.status == 200 and response.headers["Cache-Control"] == "no-store"
                found: dict[str, Any] = await response.json()
                return found

        for key in (*keys, keys[0]):
            async with client.post(
                "/v1/completions",
                json={"model": "bot", "prompt": "a secret"},
                headers={"Authorization": f"Bearer {key}"},
            ) as response:
                assert response.status == 200
        for key, count, scope in ((keys[0], 2, "key"), (keys[1], 1, "key"), ("operator", 3, "all")):
            found = await state(key)
            assert found["scope"] == scope and len(found["recent"]) == count
            assert sum(one["requests"] for one in found["costs"]) == count
            assert "a secret" not in json.dumps(found)
        assert {one["key"] for one in (await state("operator"))["costs"]} == {"ann", "ben"}
        async with client.get("/ui/state") as response:
            assert response.status == 401


@asynchronous
async def test_the_pages_files_run_nothing_from_elsewhere_and_nothing_inline() -> None:
    upstream = Upstream()
    async with before(upstream, upstream.answer) as (_, client):
        page = await _text(client, "/ui")
        assert page == await _text(client, "/ui/")
        assert 'data-asks-key="false"' in page
        linked = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert {"/ui/app.js", "/ui/style.css", "/ui/icon.svg"} == set(linked)
        assert not re.search(r"<script(?![^>]*src)|\sstyle=|\son\w+=", page)
        for path in (*set(linked), "/ui/common.js", "/ui/live.js", "/ui/playground.js"):
            text = await _text(client, path)
            assert "innerHTML" not in text and "eval(" not in text
        async with client.get("/ui/../gateway.py") as response:
            assert response.status == 404
    async with before(upstream, upstream.answer, api_key="k") as (_, client):
        assert 'data-asks-key="true"' in await _text(client, "/ui")


async def _text(client: aiohttp.ClientSession, path: str) -> str:
    async with client.get(path) as response:
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        return await response.text()


@asynchronous
async def test_the_state_has_models_routes_and_their_rollouts() -> None:
    upstream = Upstream()
    price = TokenPrice(1.0, 2.0, "a test")
    async with before(upstream, upstream.answer, price=price) as (served, client):
        plan = Plan.of(Rollout(), 0)
        rollout = start_rollout(
            served.database, "bot", "bot@new", "adapter-1", (("bot", 1.0),), plan
        )
        rollout.step, rollout.evidence = 1, Evidence(requests=50, errors=2)
        async with client.get("/ui/state") as response:
            (route,) = (await response.json())["server"]["routes"]
            assert route["rollout"] is None and route["arms"] == [{"name": "bot", "weight": 1.0}]
        served.gateway.rollout_of = {"bot": rollout}.get
        async with client.get("/ui/state") as response:
            server = (await response.json())["server"]
        shown = server["routes"][0]["rollout"]
        assert (shown["candidate"], shown["step"], shown["steps"]) == ("bot@new", 2, 4)
        assert (shown["share"], shown["requests"], shown["errors"]) == (0.1, 50, 2)
        (model,) = server["upstreams"]
        assert model["artifact"] == ARTIFACT and model["output_usd_per_million_tokens"] == 2.0


def test_what_is_kept_stays_small() -> None:
    live = Live()
    for at in range(3000):
        key = f"k{at}"
        entry = Entry(
            request_id=key, response_id=None, at_s=0.0, key_id=key, key_name=key, group=None,
            method="POST", path="x", model=f"m{at}", artifact=None, status=200, ending="complete",
            finish_reason=None, prompt_tokens=1, cached_tokens=0, output_tokens=2,
            is_estimated=False, nano_usd=None, ttft_s=0.1, duration_s=0.2, request_body="b" * 1000,
        )  # fmt: skip
        live.observe(Visit(key, "POST", "x", None, Ask(b"")), entry)
    state = live.state(None)
    assert len(state["recent"]) == 50 and len(state["costs"]) <= 513
    assert sum(one["requests"] for one in state["costs"]) == 3000
    assert len(live._by_key) <= 64 and all(one.request_body is None for one in live._recent)
