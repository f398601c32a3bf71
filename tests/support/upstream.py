"""A stand-in for the engine whose every delay and fault is known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web

from tunesmith.bench.client import open_session
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Meter, Target, open_meter
from tunesmith.bench.traffic import Prompt
from tunesmith.config import ModelError
from tunesmith.config.schema.bench import Bench
from tunesmith.pipeline import Stages

INPUT_TOKENS = 20
COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
)
PROMPTS = [
    Prompt("chat/completions", {"messages": [{"role": "user", "content": f"question {n}"}]})
    for n in range(8)
]


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
    drift: float = 1.0
    """Every phase takes this many times as long as the one before."""
    fault: str | None = None
    """http, error, truncated, abort, lost_token, short or uncounted."""
    hit_rate: float = 0.0

    asked: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    free_s: float = 0.0
    origin_s: float | None = None
    slowness: float = 1.0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        first_s = self._first_token_s(asyncio.get_running_loop().time())
        tpot_s = self.tpot_s * self.slowness
        body = await request.json()
        self.asked.append(body)
        if self.fault == "http":
            return web.Response(status=500, text="out of order")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        inputs = len(body["prompt"]) if isinstance(body.get("prompt"), list) else INPUT_TOKENS
        tokens = body["max_tokens"] - (self.fault == "short")
        made = 0
        await _send(response, _piece(inputs, made))
        while made < tokens:
            made = min(made + self.burst, tokens)
            await _until(first_s + tpot_s * (made - 1))
            if self.fault == "truncated" and made == 3:
                return response
            if self.fault == "error" and made == 3:
                await _send(response, {"error": {"message": "the engine died"}})
                break
            ending = "abort" if self.fault == "abort" else "length"
            if not (self.fault == "lost_token" and made == tokens):
                await _send(response, _piece(inputs, made, ending if made == tokens else None))
            else:
                await _send(response, _piece(inputs, made - 1, ending))
        self._count(inputs, tokens + (self.fault == "uncounted"))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _first_token_s(self, now_s: float) -> float:
        if self.origin_s is None:
            self.origin_s = now_s
        ttft_s = self.ttft_s * self.slowness
        if self.one_at_a_time:
            self.free_s = max(now_s, self.free_s) + ttft_s
            return self.free_s
        start_s, end_s = self.stall or (0.0, 0.0)
        if start_s <= now_s - self.origin_s < end_s:
            return self.origin_s + end_s + ttft_s
        return now_s + ttft_s

    def _count(self, input_tokens: int, output_tokens: int) -> None:
        self.counters["prompt_tokens"] += input_tokens
        self.counters["generation_tokens"] += output_tokens
        self.counters["prefix_cache_queries"] += input_tokens
        self.counters["prefix_cache_hits"] += input_tokens * self.hit_rate

    async def metrics(self, _: web.Request) -> web.Response:
        """A phase begins and ends with a look at these."""
        if self.origin_s is not None:
            self.origin_s, self.slowness = None, self.slowness * self.drift
        lines = [
            f'vllm:{name}_total{{engine="0"}} {value}' for name, value in self.counters.items()
        ]
        return web.Response(text="# HELP what follows\n" + "\n".join(lines) + "\n")

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            tokens = [1, 2, *body["messages"][0]["content"].encode()]
        else:
            tokens = [*body["prompt"].encode()]
        return web.json_response({"count": len(tokens), "max_model_len": 512, "tokens": tokens})

    def app(self) -> web.Application:
        """The HTTP side."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_get("/metrics", self.metrics)
        return app


@contextlib.asynccontextmanager
async def served(upstream: Upstream, port: int = 0) -> AsyncIterator[str]:
    """The URL of a running stand-in."""
    runner = web.AppRunner(upstream.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def metered(
    url: str, bench: Bench, generator: Generator, prompts: list[Prompt] = PROMPTS
) -> AsyncIterator[Meter]:
    """A meter on a stand-in that runs already."""
    async with open_session() as session:
        target = Target("stand-in", url, "m")
        yield await open_meter(target, bench, 3, Instruments(session, generator), prompts)


def _piece(inputs: int, made: int, finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": inputs, "completion_tokens": made},
    }


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def _until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - asyncio.get_running_loop().time()))


class FakeEngine:
    """In the place of `EngineServer`: the stand-in, in a process of its own."""

    upstream = Upstream()
    """What the next one runs."""
    starts = 0
    refused: tuple[str, ...] = ()
    """Parts of the paths of models, or of settings, that it has no kernel for."""
    slower: Mapping[str, float] = {}
    """How many times as long others take, by parts of their paths or settings."""
    order: list[str] = []
    """Folders of the models, as they were started."""

    def __init__(self, spec: Any, *, log_path: Path) -> None:
        self.spec, self.load_s, self.url, self.pid = spec, 0.0, "", None

    def __enter__(self) -> FakeEngine:
        name = f"{self.spec.model} {self.spec.settings} "
        if any(part in name for part in self.refused):
            raise ModelError("no kernel for it")
        type(self).starts += 1
        self.order.append(str(self.spec.model))
        (slowness,) = {n for part, n in self.slower.items() if part in name} or {1.0}
        upstream = replace(self.upstream, slowness=slowness)
        started_s = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        self._process = context.Process(target=serve_forever, args=(upstream, far))
        self._process.daemon = True
        self._process.start()
        far.close()  # so that its death is seen
        self.url = near.recv()
        self.load_s = time.perf_counter() - started_s
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def interrupted(
    command: ModuleType, stages: Stages, monkeypatch: pytest.MonkeyPatch, *, rounds: int
) -> list[str]:
    """Press Ctrl-C once a benchmark has begun so many rounds; returns the models of those."""
    begun: list[str] = []
    measure = command.one_round

    def stopping(rig: Any, name: str, *rest: Any) -> Any:
        if len(begun) == rounds:
            raise KeyboardInterrupt
        begun.append(name)
        return measure(rig, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "one_round", stopping)
        command.run(stages)
    return begun


def serve_forever(upstream: Upstream, pipe: Any) -> None:
    """A process' whole work: send the URL and answer until killed."""

    async def forever() -> None:
        async with served(upstream) as url:
            pipe.send(url)
            await asyncio.Event().wait()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(forever())
