"""A stand-in for the engine whose every delay and fault is known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tunesmith.bench.client import open_session
from tunesmith.bench.measure import Meter, Target, open_meter
from tunesmith.bench.traffic import Prompt
from tunesmith.config.schema.bench import Bench

INPUT_TOKENS = 20
COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
)


@dataclass
class Upstream:
    """Answers with `ttft_s` to the first token and `tpot_s` per token after it."""

    ttft_s: float = 0.02
    tpot_s: float = 0.002
    burst: int = 1
    """Tokens per piece."""
    one_at_a_time: bool = False
    """A queue before one server that takes `ttft_s` for each request."""
    stall: tuple[float, float] | None = None
    """No request is taken up between these seconds after a phase's first one."""
    fault: str | None = None
    """http, error, truncated, abort, lost_token, short or uncounted."""
    hit_rate: float = 0.0

    asked: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    free_s: float = 0.0
    origin_s: float | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        first_s = self._first_token_s(asyncio.get_running_loop().time())
        body = await request.json()
        self.asked.append(body)
        if self.fault == "http":
            return web.Response(status=500, text="out of order")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = body["max_tokens"] - (self.fault == "short")
        made = 0
        await _send(response, _piece(made))
        while made < tokens:
            made = min(made + self.burst, tokens)
            await _until(first_s + self.tpot_s * (made - 1))
            if self.fault == "truncated" and made == 3:
                return response
            if self.fault == "error" and made == 3:
                await _send(response, {"error": {"message": "the engine died"}})
                break
            ending = "abort" if self.fault == "abort" else "length"
            if not (self.fault == "lost_token" and made == tokens):
                await _send(response, _piece(made, ending if made == tokens else None))
            else:
                await _send(response, _piece(made - 1, ending))
        self._count(tokens + (self.fault == "uncounted"))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _first_token_s(self, now_s: float) -> float:
        if self.origin_s is None:
            self.origin_s = now_s
        if self.one_at_a_time:
            self.free_s = max(now_s, self.free_s) + self.ttft_s
            return self.free_s
        start_s, end_s = self.stall or (0.0, 0.0)
        if start_s <= now_s - self.origin_s < end_s:
            return self.origin_s + end_s + self.ttft_s
        return now_s + self.ttft_s

    def _count(self, output_tokens: int) -> None:
        self.counters["prompt_tokens"] += INPUT_TOKENS
        self.counters["generation_tokens"] += output_tokens
        self.counters["prefix_cache_queries"] += INPUT_TOKENS
        self.counters["prefix_cache_hits"] += INPUT_TOKENS * self.hit_rate

    async def metrics(self, _: web.Request) -> web.Response:
        lines = [
            f'vllm:{name}_total{{engine="0"}} {value}' for name, value in self.counters.items()
        ]
        return web.Response(text="# HELP what follows\n" + "\n".join(lines) + "\n")

    async def tokenize(self, request: web.Request) -> web.Response:
        prompt = (await request.json())["messages"][0]["content"].encode()
        tokens = [1, 2, *prompt]
        return web.json_response({"count": len(tokens), "max_model_len": 512, "tokens": tokens})


OpenMeter = Callable[[Upstream, Bench], contextlib.AbstractAsyncContextManager[Meter]]


@pytest.fixture
def upstream() -> type[Upstream]:
    return Upstream


@pytest.fixture
def metered() -> OpenMeter:
    """A meter on a running stand-in."""
    return _metered


@contextlib.asynccontextmanager
async def _metered(upstream: Upstream, bench: Bench) -> AsyncIterator[Meter]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.answer)
    app.router.add_post("/tokenize", upstream.tokenize)
    app.router.add_get("/metrics", upstream.metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    prompts = [
        Prompt("chat/completions", {"messages": [{"role": "user", "content": f"question {n}"}]})
        for n in range(8)
    ]
    try:
        async with open_session() as session:
            target = Target("stand-in", f"http://{host}:{port}/v1", "m")
            yield await open_meter(target, bench, 3, session, prompts)
    finally:
        await runner.cleanup()


def _piece(made: int, finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": made},
    }


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def _until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - asyncio.get_running_loop().time()))
