"""The same load on the real engine again and again: what intervals and verdicts are worth.

python tests/benchmarks/bench_repeats.py --model FOLDER --out docs/measured/bench-repeats-cpu.json

`FOLDER` is a chat model. One engine, `--repeats` runs of a full queue through a relay that changes
nothing (A), and as many through one that holds every piece of an answer back until 1.15 times its
time has passed (B). All runs take turns, round by round: what the machine does in these minutes is
then in the rounds of each, and neighbours meet it alike. Of 20: the interval of A's throughput
covers the mean of all A in 18 at least, neighbours among A are told apart in 2 at most, and B is
found slower than A in 18 at least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean
from typing import Any

import aiohttp
from aiohttp import web
from benchmark import describe, finish

from tunesmith.bench import compare
from tunesmith.bench.client import open_session
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Phase, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import synthetic_prompts
from tunesmith.bench.validity import Evidence, faults
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

SLOWNESS = 1.15
LEAST_RIGHT = 0.9  # of all repeats
BENCH = Bench.model_validate(
    {
        "requests": 96,
        "rounds": 8,
        "concurrency": 16,
        "prompts": "synthetic",
        "lengths": [{"input_tokens": 64, "output_tokens": 64}],
    }
)


def main() -> None:
    """Measure, write, and end with 3 when a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    spec = EngineSpec(
        options.model,
        Engine(max_num_seqs=16, max_model_len=256, kv_cache_gib=0.25),
        "float32",
        "bench",
    )
    with tempfile.TemporaryDirectory() as folder, Generator() as generator:
        log_path = Path(folder) / "engine.log"
        with EngineServer(spec, log_path=log_path) as server:
            runs = asyncio.run(_runs(server.url, generator, options.repeats))
    found = _judge(runs["A"], runs["B"])
    least = LEAST_RIGHT * options.repeats
    missed = [f"{name}: {found[name]} of {options.repeats}" for name in _COUNTED
              if found[name] < least]  # fmt: skip
    finish(options.out, describe(parser, found | {"repeats": options.repeats}), missed)


_COUNTED = ("covered", "same", "slower")


def _judge(same: list[compare.Measured], slower: list[compare.Measured]) -> dict[str, Any]:
    """Of A's runs the first only stands before the second."""
    rates = [one.figures["output_tokens_per_s"] for one in same]
    pooled = mean(rate["value"] for rate in rates)
    neighbours = [compare.compare(*two, in_turns=True) for two in zip(same, same[1:], strict=False)]
    pairs = [compare.compare(*two, in_turns=True) for two in zip(same, slower, strict=False)]
    return {
        "pooled_tokens_per_s": pooled,
        "covered": sum(rate["low"] <= pooled <= rate["high"] for rate in rates[1:]),
        "same": sum(one["verdict"] == "no difference shown" for one in neighbours),
        "slower": sum(one["verdict"] == "slower" for one in pairs),
        "invalid": sum(not one.figures["valid"] for one in [*same, *slower]),
        "runs": [one.figures for one in [*same, *slower]],
        "changes": [one["changes"].get("output_tokens_per_s") for one in [*neighbours, *pairs]],
    }


async def _runs(url: str, generator: Generator, repeats: int) -> dict[str, list[compare.Measured]]:
    """One A more than B: the first round of each, then the second of each, and so on."""
    order = [(name, place) for place in range(repeats) for name in "AB"] + [("A", repeats)]
    rounds: dict[tuple[str, int], list[Evidence]] = {run: [] for run in order}
    async with open_session() as session, _relay(url, 1.0) as plain, _relay(url, SLOWNESS) as late:
        tools = Instruments(session, generator)
        meters = {
            name: await open_meter(
                Target(name, at, "bench"), BENCH, seed, tools, synthetic_prompts(BENCH, 1)
            )
            for name, at, seed in (("A", plain, 1), ("B", late, 2))
        }
        await meters["A"].warm_up()
        for _ in range(BENCH.rounds):
            for name, place in order:
                phase = await meters[name].full_queue(rounds=1)
                rounds[name, place] += phase.rounds
    found: dict[str, list[compare.Measured]] = {"A": [], "B": []}
    for (name, place), measured in rounds.items():
        found[name].append(_run(f"{name}{place}", measured))
    return found


def _run(name: str, measured: list[Evidence]) -> compare.Measured:
    found = Phase(tuple(measured), faults(measured))
    told = [{"check": fault.check, "detail": fault.detail} for fault in found.faults]
    figures = phase_figures(found, BENCH, 1) | {"valid": not told, "faults": told}
    rounds = [(list(one.samples), one.window) for one in measured]
    return compare.Measured(name, "batch", {}, figures, rounds)


async def _read(
    answer: aiohttp.ClientResponse, arrived: asyncio.Queue[tuple[float, bytes]]
) -> None:
    """Every piece with its moment; an empty one at the end."""
    async for data in answer.content.iter_any():
        arrived.put_nowait((time.perf_counter(), data))
    arrived.put_nowait((time.perf_counter(), b""))


@contextlib.asynccontextmanager
async def _relay(url: str, slowness: float) -> AsyncIterator[str]:
    """The URL of a relay that lets answers through when `slowness` times their time has passed."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as upstream:

        async def forward(request: web.Request) -> web.StreamResponse:
            started_s = time.perf_counter()
            target = url.removesuffix("/v1") + request.path
            body = await request.read()
            async with upstream.request(
                request.method, target, data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                response = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": answer.content_type}
                )
                await response.prepare(request)
                arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
                reading = asyncio.create_task(_read(answer, arrived))
                while True:
                    # Stamped as it came: what waits for earlier pieces is no slower for it.
                    arrived_s, data = await arrived.get()
                    if not data:
                        break
                    due_s = started_s + slowness * (arrived_s - started_s)
                    if slowness > 1:
                        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    await response.write(data)
                await reading
                return response

        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            yield f"http://{host}:{port}/v1"
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    main()
