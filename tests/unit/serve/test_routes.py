"""Several upstreams behind one gateway: who is asked, and who is asked next."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from aiohttp import web
from gateways import Fixed, Served, asynchronous, behind, gateway
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.serve.client import Client
from tunesmith.serve.govern.archive import archive, read_log
from tunesmith.serve.govern.database import open_gateway, requests
from tunesmith.serve.govern.keys import create_key
from tunesmith.serve.govern.limits import Limits
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.routes import Route, Table
from tunesmith.serve.upstream import Attached, Load, Upstream


@dataclass
class Mock:
    """An upstream with faults on demand."""

    name: str
    fault: str = ""
    url: str = ""
    is_ready: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            if self.fault == "key" and request.headers.get("Authorization") != "Bearer s3cret":
                return web.json_response({}, status=401)
            if self.fault == "moved":
                raise web.HTTPPermanentRedirect("https://example.com/v2/models")
            return web.json_response({"data": [{"id": "there", "max_model_len": 4096}]})
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        match self.fault:
            case "500" | "429" | "400":
                return web.json_response({"error": {"message": "no"}}, status=int(self.fault))
            case "lost":
                assert request.transport
                request.transport.abort()
            case "slow":
                await asyncio.sleep(5)
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        if not body.get("stream"):
            return web.json_response(
                {"id": self.name, "model": body["model"], "choices": [{"index": 0}], "usage": usage}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count in range(5):
            piece = {"id": self.name, "choices": [{"index": 0, "text": str(count)}]}
            await response.write(f"data: {json.dumps(piece)}\n\n".encode())
        if self.fault == "late":
            assert request.transport
            request.transport.abort()
        else:
            await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def among(
    mocks: dict[str, Mock], *routes: Route, prices: dict[str, TokenPrice] | None = None, **more: Any
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession, dict[str, Upstream]]]:
    """A gateway in front of these."""
    async with contextlib.AsyncExitStack() as stack:
        for mock in mocks.values():
            mock.url = await stack.enter_async_context(behind(mock.answer))
        found = {
            name: Upstream(
                name, "there", mock, f"checkpoint-{name}", price=(prices or {}).get(name)
            )
            for name, mock in mocks.items()
        }
        table = Table({route.name: route for route in routes}, found)
        served, client = await stack.enter_async_context(gateway(Fixed(table), **more))
        yield served, client, found


async def ask(client: aiohttp.ClientSession, **fields: Any) -> tuple[int, dict[str, str], Any]:
    body = {"model": "bot", "prompt": "x", "max_tokens": 5} | fields
    async with client.post("/v1/completions", json=body) as response:
        found = await response.text()
        is_json = response.content_type == "application/json"
        return response.status, dict(response.headers), json.loads(found) if is_json else found


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_shares_follow_weights_and_nobody_changes_arms(weights: list[float]) -> None:
    route = Route("bot", tuple((f"arm{at}", weight) for at, weight in enumerate(weights)))
    users = [f"user-{at}" for at in range(2000)]
    found = Counter(route.choose(user) for user in users)
    for name, weight in route.arms:
        assert abs(found[name] / 2000 - weight / sum(weights)) < 0.06
    assert all(route.choose(user) == route.choose(user) for user in users[:20])


def test_a_share_that_grows_takes_users_in_and_lets_none_go() -> None:
    users, before = [f"user-{at}" for at in range(1000)], set[str]()
    for percent in (1.0, 10.0, 50.0, 99.0):
        route = Route("bot", (("new", percent), ("old", 100.0 - percent)))
        after = {user for user in users if route.choose(user) == "new"}
        assert before <= after
        before = after


@pytest.mark.parametrize("fault", ["500", "429", "lost", "slow", "down", "full"])
def test_before_the_first_byte_the_next_is_asked(fault: str) -> None:
    async def story() -> None:
        mocks = {"a": Mock("a", fault), "b": Mock("b")}
        route = Route("bot", (("a", 1.0),), fallback=("b",), timeout_s=0.2)
        async with among(mocks, route) as (served, client, found):
            if fault == "full":
                found["a"].load = Load(most_open=1, open=1)
            mocks["a"].is_ready = fault != "down"
            for stream in (False, True):
                status, headers, body = await ask(client, stream=stream, user="ann")
                assert status == 200 and headers["x-tunesmith-arm"] == "b"
                assert headers["x-tunesmith-artifact"] == "checkpoint-b"
                assert headers["x-tunesmith-route"] == "bot"
                assert (body["id"] if not stream else "b") == "b"
            assert mocks["b"].asked[0]["model"] == "there"
            lines = served.lines()
            assert [(one["arm"], one["attempts"], one["ending"]) for one in lines] == [
                ("b", 2, "complete")
            ] * 2
            assert lines[0]["version"] == "there" and lines[0]["route"] == "bot"
            assert lines[1]["output_tokens"] == 5 and lines[1]["is_estimated"]
            async with client.get("/metrics") as response:
                text = await response.text()
            reason = {"slow": "timeout", "down": "not ready"}.get(fault, fault)
            assert f'tunesmith_fallbacks_total{{reason="{reason}",route="bot"}} 2.0' in text
            assert 'tunesmith_arm_requests_total{arm="b",ending="complete"' in text
            assert not any(one.open or one.held or one.load.open > 1 for one in found.values())

    asyncio.run(asyncio.wait_for(story(), 20))


@asynchronous
async def test_what_the_last_one_says_is_what_the_client_gets() -> None:
    mocks = {"a": Mock("a", "500"), "b": Mock("b", "500"), "c": Mock("c", "400")}
    two = Route("bot", (("a", 1.0),), fallback=("a", "b"))
    async with among(mocks, two, Route("c", (("c", 1.0),), fallback=("a",))) as (_, client, _):
        assert (await ask(client))[0] == 500
        assert len(mocks["a"].asked) == len(mocks["b"].asked) == 1
        assert (await ask(client, model="c"))[0] == 400  # the client's own fault
        mocks["b"].fault = "slow"
        mocks["a"].fault = mocks["b"].fault = "lost"
        assert (await ask(client))[0] == 502
        mocks["b"].fault = "late"
        status, headers, text = await ask(client, stream=True)
        assert status == 200 and headers["x-tunesmith-arm"] == "b"
        assert "engine_unavailable" in text and "[DONE]" not in text


@asynchronous
async def test_a_wait_without_end_is_504_and_a_full_upstream_429() -> None:
    mocks = {"a": Mock("a", "slow")}
    async with among(mocks, Route("bot", (("a", 1.0),), timeout_s=0.1)) as (served, client, found):
        status, headers, body = await ask(client)
        assert status == 504 and headers["Retry-After"] and body["error"]["code"] == "timeout"
        found["a"].load = Load(most_open=1, open=1)
        status, headers, body = await ask(client)
        assert status == 429 and headers["Retry-After"] and body["error"]["code"] == "overloaded"
        mocks["a"].is_ready = False
        assert (await ask(client))[0] == 503
        assert [line["ending"] for line in served.lines()] == ["lost", "refused", "refused"]


@asynchronous
async def test_models_are_the_routes_and_engines_own_paths_are_shut() -> None:
    mocks = {"a": Mock("a"), "b": Mock("b")}
    routes = Route("bot", (("a", 1.0),)), Route("pal", (("b", 1.0),))
    async with among(mocks, *routes) as (_, client, _):
        async with client.get("/v1/models") as response:
            assert [one["id"] for one in (await response.json())["data"]] == ["bot", "pal"]
        assert (await ask(client, model="pal"))[2]["id"] == "b"
        assert (await ask(client, model="there"))[2]["error"]["code"] == "model_not_found"
        for path in (
            "load_lora_adapter", "unload_lora_adapter", "x/..%2fload_lora_adapter",
            "%6coad_lora_adapter", "/load_lora_adapter", "load_lora_adapter/", "x%3fy", "a%2f%2fb",
        ):  # fmt: skip
            async with client.post(f"/v1/{path}", json={"lora_name": "x"}) as response:
                assert response.status == 404, path
        assert mocks["a"].asked == [] and len(mocks["b"].asked) == 1


@asynchronous
async def test_a_budget_holds_whoever_answers_and_each_at_its_own_price() -> None:
    mocks, keys = {"a": Mock("a", "500"), "b": Mock("b")}, []
    prices = {"a": TokenPrice(1.0, 1.0, "a test"), "b": TokenPrice(100.0, 100.0, "a test")}

    def prepare(database: sa.Engine) -> None:
        keys.append(create_key(database, "ann", limits=Limits(usd_per_day=0.002))[1])

    route = Route("bot", (("a", 1.0),), fallback=("b",))
    async with among(mocks, route, prices=prices, keys=True, prepare=prepare) as (
        served, client, _,
    ):  # fmt: skip
        headers = {"Authorization": f"Bearer {keys[0]}"}
        statuses = []
        for _ in range(3):
            body = {"model": "bot", "prompt": [1], "max_tokens": 5}
            async with client.post("/v1/completions", json=body, headers=headers) as response:
                statuses.append(response.status)
        # At the price of `a` all of them would fit: what might be used is counted at the dearest.
        assert statuses == [429] * 3
        mocks["b"].is_ready = False
        async with client.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 503
        assert all(line["nano_usd"] in (0, None) for line in served.lines())


@asynchronous
async def test_an_attached_api_is_watched_and_gets_its_key() -> None:
    mock = Mock("a", "key")
    async with behind(mock.answer) as url, Client() as asking:
        place = Attached("a", url, {"Authorization": "Bearer s3cret"})
        upstream = Upstream("a", "there", place, "x", headers=place.headers, is_vllm=False)
        watching = asyncio.create_task(place.watch(asking, upstream))
        while not place.is_ready:
            await asyncio.sleep(0.01)
        assert upstream.max_model_len == 4096 and not upstream.is_vllm
        table = Table({"bot": Route("bot", (("a", 1.0),))}, {"a": upstream})
        async with gateway(Fixed(table)) as (served, client):
            mock.fault = ""
            assert (await ask(client))[0] == 200
            assert mock.headers[0]["Authorization"] == "Bearer s3cret"
            mock.fault = "lost"
            assert (await ask(client))[0] == 502
            assert not place.is_ready
            mock.fault = ""
            while not place.is_ready:
                await asyncio.sleep(0.01)
            assert "s3cret" not in json.dumps(served.lines(), default=str)
        wrong = Attached("a", url, {})
        mock.fault = "key"
        assert "refuses the key" in str(await wrong._probe(asking, upstream))
        mock.fault = "moved"
        moved = await wrong._probe(asking, upstream)
        assert moved and "redirects to https://example.com/v2/models" in moved
        watching.cancel()


def test_a_log_of_an_older_version_is_read_and_written_on(tmp_path: Path) -> None:
    new = {"route", "arm", "version", "attempts", "purpose", "experiment"}
    engine = open_gateway(tmp_path)
    with engine.begin() as db:
        for name in new:
            db.execute(sa.text(f"ALTER TABLE requests DROP COLUMN {name}"))
        db.execute(sa.text(
            "INSERT INTO requests (request_id, at_s, method, path, status, ending, prompt_tokens, "
            "cached_tokens, output_tokens, is_estimated, duration_s) VALUES "
            "('old', 1, 'POST', 'x', 200, 'complete', 1, 0, 1, 0, 1)"
        ))  # fmt: skip
    engine.dispose()
    old_columns = [column for column in requests.columns if column.name not in new]
    engine = open_gateway(tmp_path)
    assert archive(engine, tmp_path / "serve", 10) == 1
    (file,) = (tmp_path / "serve" / "requests").glob("*.parquet")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.parquet.read_table(file, columns=[one.name for one in old_columns]), file
    )
    lines = read_log(engine, tmp_path / "serve", ["request_id", "route", "arm"]).to_pylist()
    assert lines == [{"seq": 1, "at_s": 1.0, "request_id": "old", "route": None, "arm": None}]
