"""What the gateway adds to an upstream of 20 ms, with keys, limits, a budget and the log on.

python tests/benchmarks/gateway.py --out docs/measured/gateway-cpu.json

Upstream, gateway and client are processes of their own; direct and through the gateway take turns,
and through a bare pass-through of the same HTTP library, which is as fast as one can be with it.
With `--litellm PYTHON` (an interpreter that has `litellm[proxy]`) that proxy stands beside it; with
`--engine FOLDER` (a chat model) the same is done before the real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from mocked import free_port, run_gateway
from provenance import commit, machine

from tunesmith.config.schema.engine import Engine
from tunesmith.config.schema.serve import Serve
from tunesmith.engine import EngineServer, EngineSpec
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.keys import create_key, set_group
from tunesmith.serve.govern.limits import Limits

UPSTREAM_S = 0.020
STREAM_PIECES, PIECE_S = 16, 0.005
BOUNDS = {
    "added_p50_ms": 1.5,
    "added_p99_ms": 8.0,
    "throughput_ratio": 0.95,
    "added_ttft_ms": 2.5,
    "against_litellm": 4.0,
    "before_engine_ratio": 0.85,
}
LEAST = ("throughput_ratio", "against_litellm", "before_engine_ratio")
Place = dict[str, Any]
BODY: dict[str, Any] = {
    "model": "bot",
    "messages": [{"role": "user", "content": "Say what this function does. " * 8}],
    "max_tokens": 16,
}


def main() -> None:
    """Measure, write, and end with 3 when a bound is missed."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch, _processes(Path(scratch)) as places:
        found = {
            f"c={concurrency}": _compare(places, concurrency, options.rounds, options.requests)
            for concurrency in options.concurrency
        }
        streams = _compare_streams(places, options)
        peer = _compare_litellm(places, options, Path(scratch)) if options.litellm else None
    engine = _compare_engine(options) if options.engine else None
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "upstream_ms": UPSTREAM_S * 1e3,
        "bounds": BOUNDS,
        "whole": found,
        "streams": streams,
        "litellm": peer,
        "engine": engine,
    }
    report["missed"] = _missed(report)
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(3 if report["missed"] else 0)


def _compare(places: dict[str, Any], concurrency: int, count: int, requests: int) -> dict[str, Any]:
    """Latency and throughput, direct and through the gateway, in turns; medians over rounds."""
    names = [name for name in ("direct", "bare", "gateway") if name in places]
    rounds: list[dict[str, dict[str, float]]] = [
        {
            name: _in_process(_load, places[name], concurrency, requests * concurrency)
            for name in names
        }
        for _ in range(count)
    ]

    def median(figure: str, name: str) -> float:
        return float(statistics.median(one[name][figure] for one in rounds))

    def ratio(name: str) -> float:
        found = statistics.median(one[name]["per_s"] / one["direct"]["per_s"] for one in rounds)
        return round(found, 4)

    return {
        **{
            name: {figure: median(figure, name) for figure in ("p50_ms", "p99_ms", "per_s")}
            for name in names
        },
        **({"bare_throughput_ratio": ratio("bare")} if "bare" in names else {}),
        "added_p50_ms": round(median("p50_ms", "gateway") - median("p50_ms", "direct"), 3),
        "added_p99_ms": round(median("p99_ms", "gateway") - median("p99_ms", "direct"), 3),
        "throughput_ratio": ratio("gateway"),
        "rounds": rounds,
    }


def _compare_streams(places: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    rounds = [
        {name: _in_process(_streams, places[name], 1, 40) for name in ("direct", "gateway")}
        for _ in range(options.rounds)
    ]
    medians = {
        name: statistics.median(one[name]["ttft_p50_ms"] for one in rounds)
        for name in ("direct", "gateway")
    }
    return {
        **{f"{name}_ttft_p50_ms": value for name, value in medians.items()},
        "added_ttft_ms": round(medians["gateway"] - medians["direct"], 3),
        "rounds": rounds,
    }


def _compare_litellm(
    places: dict[str, Any], options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """It runs only here: idle, too, it would take from the others' time."""
    port = free_port()
    place = {"url": f"http://127.0.0.1:{port}/v1", "key": "sk-bench"}
    peer = _litellm(options.litellm, port, places["direct"]["url"], scratch)
    try:
        _wait(place)
        rounds = [
            {
                name: _in_process(_load, one, 64, options.requests * 8)
                for name, one in (("litellm", place), ("gateway", places["gateway"]))
            }
            for _ in range(options.rounds)
        ]
    finally:
        peer.terminate()
        peer.wait()
    ratios = [one["gateway"]["per_s"] / one["litellm"]["per_s"] for one in rounds]
    return {"against_litellm": round(statistics.median(ratios), 2), "rounds": rounds}


def _compare_engine(options: argparse.Namespace) -> dict[str, Any]:
    """The gateway before vLLM, sixteen clients that want 64 tokens each."""
    body = {"max_tokens": 64, "temperature": 0, "ignore_eos": True}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        settings = Engine(max_num_seqs=16, max_model_len=512, kv_cache_gib=0.5)
        spec = EngineSpec(options.engine.absolute(), settings, "bfloat16", "bot")
        port = free_port()
        with (
            EngineServer(spec, port=port, log_path=scratch / "engine.log"),
            _gateway(scratch, port) as gateway,
        ):
            direct = {"url": f"http://127.0.0.1:{port}/v1", "key": ""}
            places = {"direct": direct | {"body": body}, "gateway": gateway | {"body": body}}
            found = _compare(places, 16, options.rounds, options.requests // 4)
    return {"before_engine_ratio": found.pop("throughput_ratio"), "whole": found}


def _missed(report: dict[str, Any]) -> list[str]:
    parts = {**report["whole"], "streams": report["streams"], "litellm": report["litellm"] or {}}
    parts["engine"] = report["engine"] or {}
    return [
        f"{name}: {figure} {part[figure]} against {bound}"
        for name, part in parts.items()
        for figure, bound in BOUNDS.items()
        if figure in part and (part[figure] < bound if figure in LEAST else part[figure] > bound)
    ]


def _load(place: Place, concurrency: int, requests: int) -> dict[str, float]:
    """A closed loop of whole answers."""

    async def play() -> dict[str, float]:
        latencies: list[float] = []
        async with _session(place) as client:
            await _one(client, place)

            async def worker() -> None:
                for _ in range(requests // concurrency):
                    started_s = time.perf_counter()
                    await _one(client, place)
                    latencies.append(time.perf_counter() - started_s)

            began_s = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            per_s = len(latencies) / (time.perf_counter() - began_s)
        p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
        return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "per_s": round(per_s, 2)}

    return asyncio.run(play())


async def _one(client: aiohttp.ClientSession, place: Place) -> None:
    body = BODY | place.get("body", {})
    async with client.post(f"{place['url']}/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        await response.read()


def _streams(place: Place, _concurrency: int, requests: int) -> dict[str, float]:
    """Time to the first piece."""

    async def play() -> dict[str, float]:
        firsts = []
        async with _session(place) as client:
            for _ in range(requests):
                started_s = time.perf_counter()
                async with client.post(
                    f"{place['url']}/chat/completions", json=BODY | {"stream": True}
                ) as response:
                    await response.content.readuntil(b"\n\n")
                    firsts.append(time.perf_counter() - started_s)
                    await response.read()
        return {"ttft_p50_ms": round(statistics.median(firsts) * 1e3, 3)}

    return asyncio.run(play())


def _session(place: Place) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {place['key']}"}
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))


def _in_process(work: Any, place: Place, concurrency: int, requests: int) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (place, concurrency, requests))


@contextmanager
def _processes(scratch: Path) -> Iterator[dict[str, Any]]:
    """Where the upstream, the gateway and a bare pass-through answer."""
    behind, bare = free_port(), free_port()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_upstream, args=(behind,), daemon=True),
        context.Process(target=_pass_through, args=(bare, behind), daemon=True),
    ]
    for worker in workers:
        worker.start()
    places = {
        "direct": {"url": f"http://127.0.0.1:{behind}/v1", "key": ""},
        "bare": {"url": f"http://127.0.0.1:{bare}/v1", "key": ""},
    }
    try:
        for place in places.values():
            _wait(place)
        with _gateway(scratch, behind) as gateway:
            yield places | {"gateway": gateway}
    finally:
        for worker in workers:
            worker.terminate()


@contextmanager
def _gateway(scratch: Path, behind: int) -> Iterator[Place]:
    """One that governs all it can before what answers on a port."""
    port = free_port()
    database = open_gateway(scratch)
    set_group(database, "lab", Limits(tokens_per_day=10**12))
    limits = Limits(10**9, 10**12, 10_000, 10**12, 1e9)
    _, key = create_key(database, "bench", group="lab", limits=limits)
    worker = multiprocessing.get_context("spawn").Process(
        target=run_gateway, args=(port, behind, str(scratch), Serve(keys=True)), daemon=True
    )
    worker.start()
    place = {"url": f"http://127.0.0.1:{port}/v1", "key": key}
    try:
        _wait(place)
        yield place
    finally:
        worker.terminate()


def _upstream(port: int) -> None:
    usage = {"prompt_tokens": 60, "completion_tokens": 16, "total_tokens": 76}
    choice = {"index": 0, "message": {"role": "assistant", "content": "It adds two numbers."}}
    whole = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "bot"}
    whole |= {"choices": [choice | {"finish_reason": "stop"}], "usage": usage}

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        await asyncio.sleep(UPSTREAM_S)
        if not body.get("stream"):
            return web.json_response(whole)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count in range(1, STREAM_PIECES + 1):
            delta = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
            piece = whole | {"object": "chat.completion.chunk", "choices": [delta]}
            piece |= {"usage": usage | {"completion_tokens": count}}
            await response.write(f"data: {json.dumps(piece)}\n\n".encode())
            await asyncio.sleep(PIECE_S)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def _pass_through(port: int, behind: int) -> None:
    """Whole bodies there and back, unseen."""

    async def client(app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app[session]:
            yield

    async def hand_on(request: web.Request) -> web.Response:
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{behind}{request.path}"
        async with request.app[session].request(
            request.method, url, data=await request.read(), headers=headers
        ) as answer:
            return web.Response(body=await answer.read(), headers=headers)

    session = web.AppKey("session", aiohttp.ClientSession)
    app = web.Application()
    app.cleanup_ctx.append(client)
    app.router.add_route("*", "/v1/{path:.+}", hand_on)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def _litellm(python: Path, port: int, upstream: str, scratch: Path) -> subprocess.Popen[bytes]:
    config = scratch / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: bot\n  litellm_params:\n    model: openai/bot\n"
        f"    api_base: {upstream}\n    api_key: none\n"
        "general_settings:\n  master_key: sk-bench\n"
    )
    program = python.parent / "litellm"
    return subprocess.Popen(
        [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
        stdout=(scratch / "litellm.log").open("wb"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
    )


def _wait(place: Place) -> None:
    deadline_s = time.monotonic() + 120
    request = urllib.request.Request(
        f"{place['url']}/models", headers={"Authorization": f"Bearer {place['key']}"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="of each client and round")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--litellm", type=Path, help="a Python that has litellm[proxy]")
    parser.add_argument("--engine", type=Path, help="a chat model for the real engine")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
