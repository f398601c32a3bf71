"""The gateway under four times what its upstream can do, and its memory over 100,000 requests.

python tests/benchmarks/gateway_overload.py --out docs/measured/gateway-overload-cpu.json

Upstream, gateway and client are processes of their own, with keys, limits, a budget, guardrails and
the request log on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from benchmark import describe, finish
from mocked import Mocked, mocked

from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.config.schema.serve import Serve
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.keys import create_key
from tunesmith.serve.govern.limits import Limits

SLOTS, UPSTREAM_S = 4, 0.040
"""The upstream can do 100 requests a second."""

OPEN = 8
OVERLOAD = 4
LARGEST_GROWTH_MIB = 5 / 1.048576
"""5 MB."""

LEAST_GOODPUT = 0.9
LONGEST_REFUSAL_P99_MS = 50.0
BODY = {
    "model": "bot",
    "messages": [{"role": "user", "content": "Say what this function does. " * 8}],
    "max_tokens": 16,
}


def main() -> None:
    """Measure, write, and end with 3 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round and load")
    parser.add_argument("--requests", type=int, default=100_000, help="over which memory may grow")
    parser.add_argument("--warm-up", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.rounds:
        figures["overload"] = _overload(options)
    if options.requests:
        figures["memory"] = _memory(options)
    finish(options.out, describe(parser, figures), _faults(figures))


def _overload(options: argparse.Namespace) -> dict[str, Any]:
    """Goodput at saturation, and at four times that; medians over rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        key = _key(Path(scratch))
        section = _section(OPEN)
        with mocked(Path(scratch), section, upstream_s=UPSTREAM_S, slots=SLOTS) as place:
            rounds = []
            for _ in range(options.rounds):
                peak = _in_process(_closed, place.url, key, OPEN, options.seconds)
                rate = OVERLOAD * peak["good_per_s"]
                over = _in_process(_open, place.url, key, rate, options.seconds)
                rounds.append({"peak": peak, "overload": over})
    return {
        "peak_per_s": _median(one["peak"]["good_per_s"] for one in rounds),
        "goodput_ratio": _median(
            one["overload"]["good_per_s"] / one["peak"]["good_per_s"] for one in rounds
        ),
        "refusal_p99_ms": _median(one["overload"]["refusal_p99_ms"] for one in rounds),
        "rounds": rounds,
    }


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    """What the gateway's process has after the warm-up and after the requests."""
    with tempfile.TemporaryDirectory() as scratch:
        key = _key(Path(scratch))
        with mocked(Path(scratch), _section(0), upstream_s=0.0) as place:
            line = [_grow(place, key, options.warm_up)]
            parts = 10
            for _ in range(parts):
                line.append(_grow(place, key, options.requests // parts))
    return {
        "requests": options.requests,
        "warm_up": options.warm_up,
        "mib": line,
        "growth_mib": round(line[-1] - line[0], 2),
    }


def _grow(place: Mocked, key: str, requests: int) -> float:
    _in_process(_closed, place.url, key, 16, requests)
    time.sleep(1)  # the log is written a few times a second
    return round(place.rss_mib, 2)


def _section(most_open: int) -> Serve:
    rails = (Guardrail(name="pii", pii=("email", "card")),)
    return Serve(keys=True, max_open_requests=most_open, guardrails=rails)


def _key(store: Path) -> str:
    limits = Limits(10**9, 10**12, 10_000, 10**12, 1e9)
    return create_key(open_gateway(store), "bench", limits=limits)[1]


def _closed(url: str, key: str, concurrency: int, amount: float) -> dict[str, float]:
    """Each client asks again as soon as it is answered; for seconds, or (an int) so often."""

    async def play() -> dict[str, float]:
        until_s = time.perf_counter() + amount
        turns = itertools.repeat(0) if isinstance(amount, float) else iter(range(amount))
        statuses: Counter[int] = Counter()
        async with _client(url, key) as client:

            async def worker() -> None:
                for _ in turns:
                    if isinstance(amount, float) and time.perf_counter() > until_s:
                        return
                    status, _latency_s = await _one(client)
                    statuses[status] += 1

            began_s = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            took_s = time.perf_counter() - began_s
        assert statuses.keys() == {200}, statuses
        return {"good_per_s": round(statuses[200] / took_s, 2)}

    return asyncio.run(play())


def _open(url: str, key: str, rate_per_s: float, seconds: float) -> dict[str, float]:
    """Requests at fixed times, whatever became of those before."""

    async def play() -> dict[str, float]:
        found: list[tuple[int, float]] = []
        async with _client(url, key) as client:

            async def at(delay_s: float) -> None:
                await asyncio.sleep(began_s + delay_s - time.perf_counter())
                found.append(await _one(client))

            began_s = time.perf_counter()
            times = np.arange(0, seconds, 1 / rate_per_s)
            await asyncio.gather(*(at(float(one)) for one in times))
        statuses = Counter(status for status, _ in found)
        assert statuses.keys() <= {200, 429}, statuses
        refused = [latency_s for status, latency_s in found if status == 429]
        return {
            "offered_per_s": round(rate_per_s, 1),
            "good_per_s": round(statuses[200] / seconds, 2),
            "refused": statuses[429],
            "refusal_p50_ms": round(float(np.percentile(refused, 50)) * 1e3, 2),
            "refusal_p99_ms": round(float(np.percentile(refused, 99)) * 1e3, 2),
        }

    return asyncio.run(play())


async def _one(client: aiohttp.ClientSession) -> tuple[int, float]:
    started_s = time.perf_counter()
    async with client.post("/v1/chat/completions", json=BODY) as response:
        await response.read()
        return response.status, time.perf_counter() - started_s


def _client(url: str, key: str) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {key}"}
    return aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0))


def _in_process(work: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _median(values: Any) -> float:
    return round(float(np.median(list(values))), 4)


def _faults(figures: dict[str, Any]) -> list[str]:
    faults = []
    if over := figures.get("overload"):
        if over["goodput_ratio"] < LEAST_GOODPUT:
            faults.append(f"goodput {over['goodput_ratio']} of the peak, not {LEAST_GOODPUT}")
        if over["refusal_p99_ms"] > LONGEST_REFUSAL_P99_MS:
            faults.append(f"429 after {over['refusal_p99_ms']} ms at p99")
    if (memory := figures.get("memory")) and memory["growth_mib"] > LARGEST_GROWTH_MIB:
        faults.append(f"memory grew by {memory['growth_mib']} MiB")
    return faults


if __name__ == "__main__":
    main()
