"""The page at `/ui` in a real browser, where there is one."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from browser import BROWSER, Page, chromium
from gateways import before

from tunesmith.config import Recipe
from tunesmith.config.schema.routes import Rollout
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages
from tunesmith.serve.feedback.export import run
from tunesmith.serve.govern.keys import create_key
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.rollout.decide import Plan
from tunesmith.serve.rollout.record import start_rollout

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
ANSWER = "It adds two numbers and gives back their sum, as its name says."
SHOTS = os.environ.get("TUNESMITH_SCREENSHOTS", "")
"""A folder for pictures of the page, for those who change it."""


class Upstream:
    """Streams one answer, word by word."""

    def __init__(self) -> None:
        self.url, self.is_ready, self.turn = "", True, 0

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})
        body = await request.json()
        self.turn += 1
        form = {"id": f"chatcmpl-{self.turn}", "object": "chat.completion.chunk", "model": "bot"}
        usage = {"prompt_tokens": 40, "completion_tokens": 0}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = [*(f"{word} " for word in ANSWER.split()), None]
        for count, word in enumerate(words, 1):
            delta = {"content": word} if word else {}
            choice = {"index": 0, "delta": delta, "finish_reason": None if word else "stop"}
            event = {"choices": [choice], "usage": usage | {"completion_tokens": count}}
            await response.write(f"data: {json.dumps(form | event)}\n\n".encode())
            await asyncio.sleep(0.01)
        if body["stream_options"]["include_usage"]:
            last = {"choices": [], "usage": usage | {"completion_tokens": len(words)}}
            await response.write(f"data: {json.dumps(form | last)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


async def ask(client: aiohttp.ClientSession, key: str, count: int) -> None:
    message = {"role": "user", "content": "What does add do?"}
    body = {"model": "bot", "messages": [message], "stream": True}
    for _ in range(count):
        async with client.post(
            "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
        ) as response:
            await response.read()
    async with client.post("/v1/chat/completions", data=b"{") as response:
        assert response.status == 401


async def shoot(page: Page, name: str) -> None:
    """Both widths; neither may be wider than its window."""
    for width in (1280, 390):
        await page.resize(width, 900)
        await asyncio.sleep(0.1)
        assert await page.read("document.documentElement.scrollWidth") <= width
        for scheme in ("dark", "light") if SHOTS else ():
            wanted = [{"name": "prefers-color-scheme", "value": scheme}]
            await page.call("Emulation.setEmulatedMedia", features=wanted)
            await page.shoot(Path(SHOTS) / f"{name}-{width}-{scheme}.png")
    await page.resize(1280, 900)


def click(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).click()"


async def use(page: Page, client: aiohttp.ClientSession, url: str, key: str) -> None:
    """What somebody does there."""
    await page.open(f"{url}ui")
    await page.until("!document.getElementById('gate').hidden")
    await shoot(page, "gate")
    await page.read("document.getElementById('key').value = 'ts-00000000-wrong'")
    await page.read(click("#key-form button"))
    await page.until("document.getElementById('key-fault').textContent.includes('know this key')")
    # The browser itself tells of a refused request.
    assert page.faults and all("401" in fault for fault in page.faults)
    page.faults.clear()
    await page.read(f"document.getElementById('key').value = {json.dumps(key)}")
    await page.read(click("#key-form button"))
    await page.until("document.getElementById('status').textContent === 'ready'")

    await ask(client, key, 3)
    await page.until("document.querySelectorAll('#recent tr[data-id]').length === 3")
    assert "rollout 1 of 4" in await page.read("document.getElementById('routes').textContent")
    assert "ann" in await page.read("document.getElementById('costs').textContent")
    await page.until("Number(document.getElementById('requests-per-s').textContent) > 0")
    await page.until("document.getElementById('usd').textContent.startsWith('$0.')")
    await shoot(page, "live")
    await page.read(click("#recent tr[data-id] .thumbs button"))
    await page.until("document.getElementById('toast').textContent.startsWith('Thank you')")

    await page.read(click("#tab-playground"))
    await page.until("document.getElementById('model-a').options.length === 1")
    await page.read("document.getElementById('model-b').value = 'bot'")
    await page.read("document.getElementById('prompt').value = 'What does add do?'")
    await page.read(click("#send"))
    await page.until("document.querySelector('.said.writing')?.textContent.length > 5")
    await page.until("document.querySelectorAll('#panes .thumbs').length === 2")
    texts = "[...document.querySelectorAll('.said.assistant')].map((one) => one.textContent.trim())"
    assert await page.read(texts) == [ANSWER, ANSWER]
    assert "tokens/s" in await page.read("document.querySelector('.foot').textContent")
    await shoot(page, "playground")
    await page.read(click("#panes .thumbs button:last-child"))
    await page.read("document.getElementById('correction').value = 'The sum.'")
    await shoot(page, "correct")
    await page.read("document.getElementById('toast').textContent = ''")
    await page.read(click("#words-form .primary"))
    await page.until("document.getElementById('toast').textContent.startsWith('Thank you')")
    assert page.faults == []


def test_from_the_key_to_the_export(tmp_path: Path) -> None:
    upstream, keys = Upstream(), []

    async def go() -> None:
        async with before(
            upstream, upstream.answer, store=tmp_path, keys=True, log={"payload": True},
            price=TokenPrice(20.0, 60.0, "a test"),
            prepare=lambda database: keys.append(create_key(database, "ann", group=None)[1]),
        ) as (served, client), chromium() as page:  # fmt: skip
            plan, old = Plan.of(Rollout(), 0), (("bot", 1.0),)
            rollout = start_rollout(served.database, "bot", "bot@new", "adapter-1", old, plan)
            served.gateway.rollout_of = {"bot": rollout}.get
            await use(page, client, str(client._base_url), keys[0])

    asyncio.run(asyncio.wait_for(go(), 90))
    recipe = Recipe.model_validate(
        {"name": "bot", "store": {"folder": tmp_path}, "model": {"base": "x"}, "serve": {}}
    )
    stages: Any = Stages(recipe, Store.of(recipe))
    result = run(stages)
    rows = [json.loads(line) for line in Path(result["file"]).read_text().splitlines()]
    said = {row["messages"][-1]["content"].strip() for row in rows}
    assert said == {ANSWER, "The sum."}
