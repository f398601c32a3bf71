"""The same load on the real engine again and again: what intervals and verdicts are worth.

python tests/benchmarks/bench_repeats.py --model FOLDER --out docs/measured/bench-repeats-cpu.json

`FOLDER` is a chat model. One engine, `--repeats` runs of a full queue (A), and as many while its
processes stand still for 15 of every 115 ms (B). All runs take turns, round by round: what the
machine does in these minutes is then in the rounds of each, and neighbours meet it alike. Of 20:
the interval of A's throughput covers the mean of all A in 18 at least, neighbours among A are told
apart in 2 at most, and B is found slower than A in 18 at least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark import describe, finish

from tunesmith.bench import compare
from tunesmith.bench.client import open_session
from tunesmith.bench.figures import tokens_per_s
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Phase, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import synthetic_prompts
from tunesmith.bench.validity import Evidence, faults
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

SLOWNESS, CYCLE_S = 1.15, 0.1
LEAST_RIGHT = 0.9  # of all repeats
BENCH = Bench.model_validate(
    {
        "requests": 64,
        "rounds": 12,
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
            runs = asyncio.run(_runs(server, generator, options.repeats))
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


async def _runs(
    server: EngineServer, generator: Generator, repeats: int
) -> dict[str, list[compare.Measured]]:
    """One A more than B: the first round of each, then the second of each, and so on."""
    order = [(name, place) for place in range(repeats) for name in "AB"] + [("A", repeats)]
    rounds: dict[tuple[str, int], list[Evidence]] = {run: [] for run in order}
    group = server.pid
    assert group
    async with open_session() as session:
        target, tools = Target("engine", server.url, "bench"), Instruments(session, generator)
        meter = await open_meter(target, BENCH, 1, tools, synthetic_prompts(BENCH, 1))
        await meter.warm_up()
        for _ in range(BENCH.rounds):
            for name, place in order:
                async with _slower(group) if name == "B" else contextlib.nullcontext():
                    phase = await meter.full_queue(rounds=1)
                rounds[name, place] += phase.rounds
    found: dict[str, list[compare.Measured]] = {"A": [], "B": []}
    for (name, place), measured in rounds.items():
        found[name].append(_run(f"{name}{place}", measured))
    return found


def _run(name: str, measured: list[Evidence]) -> compare.Measured:
    found = Phase(tuple(measured), faults(measured))
    told = [{"check": fault.check, "detail": fault.detail} for fault in found.faults]
    figures = phase_figures(found, BENCH, 1) | {"valid": not told, "faults": told}
    figures["rounds_tokens_per_s"] = [tokens_per_s(one.samples, one.window) for one in measured]
    rounds = [(list(one.samples), one.window) for one in measured]
    return compare.Measured(name, "batch", {}, figures, rounds)


@contextlib.asynccontextmanager
async def _slower(group: int) -> AsyncIterator[None]:
    """Meanwhile all processes of an engine stand still for a part of the time."""

    async def halt() -> None:
        while True:
            await asyncio.sleep(CYCLE_S)
            os.killpg(group, signal.SIGSTOP)
            try:
                await asyncio.sleep(CYCLE_S * (SLOWNESS - 1))
            finally:
                os.killpg(group, signal.SIGCONT)

    halting = asyncio.create_task(halt())
    try:
        yield
    finally:
        halting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await halting


if __name__ == "__main__":
    main()
