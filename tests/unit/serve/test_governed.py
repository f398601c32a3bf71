"""Keys, limits, budgets and the log over HTTP, before an upstream that answers like vLLM."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from gateways import ARTIFACT, asynchronous, before
from sqlalchemy.engine import Engine as Database

from tunesmith.config import UserError
from tunesmith.serve.govern.journal import read_spending
from tunesmith.serve.govern.keys import create_key, revoke_key, set_group
from tunesmith.serve.govern.limits import Limits
from tunesmith.serve.govern.price import TokenPrice

PRICE = TokenPrice(1.0, 10.0, "a test")


@dataclass
class Upstream:
    """Counts the tokens that it has made, as an engine's own counters do."""

    url: str = ""
    is_ready: bool = True
    pause_s: float = 0.0
    lingers_s: float = 0.0
    """Between the last event of a stream and its end."""

    made: Counter[str] = field(default_factory=Counter)

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})
        body = json.loads(await request.read())
        if body.get("fail"):
            return web.json_response({"error": {"message": "no"}}, status=400)
        self.made["prompt"] += 10
        if not body.get("stream"):
            await asyncio.sleep(self.pause_s)
            self.made["output"] += body["max_tokens"]
            return web.json_response(
                {"id": "c-1", **self.choice(), **self.usage(body["max_tokens"])}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count in range(1, body["max_tokens"] + 1):
            await asyncio.sleep(self.pause_s)
            self.made["output"] += 1
            event = json.dumps({"id": "c-1", **self.choice(), **self.usage(count)})
            await response.write(f"data: {event}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await asyncio.sleep(self.lingers_s)
        return response

    @staticmethod
    def usage(output: int) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": 10, "completion_tokens": output}}

    @staticmethod
    def choice() -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}


def ask(key: str = "", **fields: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"json": {"model": "bot", "prompt": "x", "max_tokens": 5} | fields, "headers": headers}


@asynchronous
async def test_two_hundred_at_once_on_a_budget_worth_ten() -> None:
    """A request costs 10 + 5 tokens; before it starts only its bytes can be counted here."""
    upstream, keys = Upstream(pause_s=0.01), []

    def prepare(database: Database) -> None:
        keys.append(create_key(database, "ann", limits=Limits(tokens_per_day=10 * 15 + 400))[1])

    async with before(upstream, upstream.answer, keys=True, prepare=prepare) as (served, client):

        async def one() -> int:
            async with client.post("/v1/completions", **ask(keys[0])) as response:
                if response.status == 429:
                    error = (await response.json())["error"]
                    assert error["code"] == "tokens_per_day"
                    assert int(response.headers["Retry-After"]) > 0
                return response.status

        found = Counter(await asyncio.gather(*(one() for _ in range(200))))
        assert found.keys() == {200, 429}
        spent = found[200] * 15
        assert upstream.made.total() == spent <= 550
        assert found[200] >= 10
        log = Counter((line["status"], line["ending"]) for line in served.lines())
        assert log == {(200, "complete"): found[200], (429, "refused"): found[429]}
        (used,) = read_spending(served.database, int(time.time() // 86_400)).values()
        assert used.tokens == spent


@asynchronous
async def test_streams_that_are_left_are_charged_what_was_made_for_them() -> None:
    upstream = Upstream(pause_s=0.1)
    async with before(upstream, upstream.answer, price=PRICE) as (served, client):

        async def leave() -> None:
            async with client.post(
                "/v1/completions", **ask(stream=True, max_tokens=50)
            ) as response:
                await response.content.readuntil(b"\n\n")
                text = await response.content.readuntil(b"\n\n")
                assert b"usage" not in text

        await asyncio.gather(*(leave() for _ in range(100)))
        for _ in range(100):
            if len(lines := served.lines()) == 100:
                break
            await asyncio.sleep(0.05)
        assert [line["ending"] for line in lines] == ["disconnected"] * 100
        assert all(line["ttft_s"] > 0 and not line["is_estimated"] for line in lines)
        counted = sum(line["output_tokens"] for line in lines)
        assert upstream.made["output"] - 100 <= counted <= upstream.made["output"]
        assert all(line["nano_usd"] == 10_000 + line["output_tokens"] * 10_000 for line in lines)


@asynchronous
async def test_the_log_adds_up_to_what_the_engine_counted_and_has_the_lineage() -> None:
    upstream, keys = Upstream(), []

    def prepare(database: Database) -> None:
        set_group(database, "lab", Limits(usd_per_day=1.0))
        keys.append(create_key(database, "ann", group="lab")[1])

    async with before(
        upstream, upstream.answer, keys=True, price=PRICE, prepare=prepare,
        log={"payload": True, "redact": [r"\d{3}"], "max_payload_characters": 100},
    ) as (served, client):  # fmt: skip
        for number in range(20):
            asked = ask(keys[0], stream=number % 2 == 0, max_tokens=number + 1, user="123")
            async with client.post(
                "/v1/completions",
                **asked | {"headers": asked["headers"] | {"X-Request-Id": f"q{number}"}},
            ) as response:
                assert response.headers["x-request-id"] == f"q{number}"
                await response.read()
        async with client.post("/v1/completions", **ask(keys[0], fail=True)) as response:
            assert response.status == 400
        lines = served.lines()
        assert [line["request_id"] for line in lines[:20]] == [f"q{n}" for n in range(20)]
        assert lines[20]["status"] == 400 and lines[20]["ending"] == "error"
        assert sum(line["prompt_tokens"] for line in lines) == upstream.made["prompt"]
        assert sum(line["output_tokens"] for line in lines) == upstream.made["output"]
        assert {line["artifact"] for line in lines} == {ARTIFACT}
        assert {line["group"] for line in lines} == {"lab"} and lines[0]["response_id"] == "c-1"
        assert all("123" not in line["request_body"] for line in lines)
        assert "[redacted]" in lines[0]["request_body"]
        assert all(0 < len(line["response_body"]) <= 100 for line in lines)
        async with client.get("/metrics", headers=ask(keys[0])["headers"]) as response:
            text = await response.text()
        assert f'tunesmith_tokens_total{{kind="output"}} {upstream.made["output"]}.0' in text
        assert keys[0] not in text and keys[0] not in json.dumps(lines)


@asynchronous
async def test_who_may_not_ask_is_told_why_and_logged() -> None:
    upstream, keys = Upstream(), []

    def prepare(database: Database) -> None:
        keys.append(create_key(database, "ann", models=("other",))[1])
        keys.append(create_key(database, "bob", limits=Limits(requests_per_minute=2))[1])
        keys.append(create_key(database, "eve")[1])

    async with before(upstream, upstream.answer, keys=True, prepare=prepare) as (served, client):
        async with client.post("/v1/completions", **ask(keys[0])) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "model_not_allowed"
        statuses = []
        for _ in range(3):
            async with client.post("/v1/completions", **ask(keys[1])) as response:
                statuses.append(response.status)
        assert statuses == [200, 200, 429]
        revoke_key(served.database, keys[2].split("-")[1])
        for _ in range(40):
            async with client.post("/v1/completions", **ask(keys[2])) as response:
                if response.status == 401:
                    break
            await asyncio.sleep(0.05)
        assert response.status == 401
        for path in ("/metrics", "/v1/models", "/v1/completions"):
            async with client.get(path) as response:
                assert response.status == 401
        logged = Counter(line["status"] for line in served.lines())
        assert logged[403] == 1 and logged[429] == 1 and logged[401] == 4


@asynchronous
async def test_budgets_survive_a_restart() -> None:
    """Each request costs 60 µUSD, and may cost about 420 before its tokens are counted."""
    upstream, keys = Upstream(), []

    def prepare(database: Database) -> None:
        keys.append(create_key(database, "ann", limits=Limits(usd_per_day=0.0006))[1])

    async def status(client: aiohttp.ClientSession) -> int:
        async with client.post("/v1/completions", **ask(keys[0])) as response:
            return response.status

    with TemporaryDirectory() as store:
        settings: Any = {"keys": True, "price": PRICE, "store": Path(store)}
        async with before(upstream, upstream.answer, prepare=prepare, **settings) as (_, client):
            answered = 0
            while await status(client) == 200:
                answered += 1
            assert 1 < answered < 10
        async with before(upstream, upstream.answer, **settings) as (_, client):
            assert await status(client) == 429


@asynchronous
async def test_a_budget_in_usd_needs_a_price() -> None:
    upstream = Upstream()

    def prepare(database: Database) -> None:
        create_key(database, "ann", limits=Limits(usd_per_day=1.0))

    with pytest.raises(UserError, match="nothing says what a token costs"):
        async with before(upstream, upstream.answer, keys=True, prepare=prepare):
            pass


@asynchronous
async def test_more_than_may_be_open_are_turned_away_at_once() -> None:
    upstream = Upstream(pause_s=0.2)
    async with before(upstream, upstream.answer, max_open_requests=4) as (served, client):

        async def one() -> tuple[int, str | None]:
            async with client.post("/v1/completions", **ask()) as response:
                code = (await response.json()).get("error", {}).get("code")
                return response.status, code

        found = Counter(await asyncio.gather(*(one() for _ in range(20))))
        assert found == {(200, None): 4, (429, "overloaded"): 16}


@asynchronous
async def test_a_whole_answer_that_nobody_waits_for_is_charged_by_its_time() -> None:
    upstream = Upstream(pause_s=0.2)
    async with before(upstream, upstream.answer, price=PRICE) as (served, client):
        async with client.post("/v1/completions", **ask(max_tokens=10)) as response:
            await response.read()
        with pytest.raises(asyncio.TimeoutError):
            timeout = aiohttp.ClientTimeout(total=0.1)
            await client.post("/v1/completions", **ask(max_tokens=1000), timeout=timeout)
        for _ in range(40):
            if len(lines := served.lines()) == 2:
                break
            await asyncio.sleep(0.05)
        assert lines[1]["is_estimated"] and lines[1]["ending"] == "disconnected"
        assert 1 <= lines[1]["output_tokens"] <= 50


@asynchronous
async def test_who_leaves_before_the_engine_has_it_is_charged_nothing() -> None:
    """The second request waits for the budget that the first one holds."""
    upstream, keys = Upstream(pause_s=0.5), []

    def prepare(database: Database) -> None:
        keys.append(create_key(database, "ann", limits=Limits(tokens_per_day=500))[1])

    async with before(upstream, upstream.answer, keys=True, prepare=prepare) as (served, client):
        first = asyncio.create_task(client.post("/v1/completions", **ask(keys[0])))
        await asyncio.sleep(0.1)
        with pytest.raises(asyncio.TimeoutError):
            timeout = aiohttp.ClientTimeout(total=0.1)
            await client.post("/v1/completions", **ask(keys[0]), timeout=timeout)
        (await first).close()
        for _ in range(40):
            if len(lines := served.lines()) == 2:
                break
            await asyncio.sleep(0.05)
        left = next(line for line in lines if line["ending"] == "disconnected")
        assert left["prompt_tokens"] == left["output_tokens"] == 0
        (used,) = read_spending(served.database, int(time.time() // 86_400)).values()
        assert used.tokens == 15 == upstream.made.total()


@asynchronous
async def test_who_leaves_after_the_end_of_a_stream_has_had_all_of_it() -> None:
    upstream = Upstream()
    upstream.lingers_s = 0.5
    async with before(upstream, upstream.answer) as (served, client):
        async with client.post("/v1/completions", **ask(stream=True)) as response:
            await response.content.readuntil(b"[DONE]\n\n")
            response.close()
        for _ in range(40):
            if lines := served.lines():
                break
            await asyncio.sleep(0.05)
        assert (lines[0]["ending"], lines[0]["status"]) == ("complete", 200)
        assert lines[0]["output_tokens"] == 5
