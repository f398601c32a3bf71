"""Benchmarks against an upstream whose every delay and fault is known beforehand.

python tests/benchmarks/bench_truth.py --out docs/measured/bench-truth-cpu.json

Upstream, load generator and this program are processes of their own. Each case is measured
`--repeats` times; p50, p95 and p99 must be within 5 % of the true value each time, and each
injected fault must be found for its own reason and no other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from benchmark import describe, finish
from upstream import Upstream, metered, serve_forever

from tunesmith.bench.arrivals import gamma_arrivals, poisson_arrivals
from tunesmith.bench.figures import latencies_ms
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Meter, Phase
from tunesmith.config.schema.bench import Bench

BOUND = 0.05
SEED = 3  # of the support's meter
PERCENTS = (50, 95, 99)
SERVICE_S = 0.06

# The fault that is injected, the check that must find it, and what a fault may bring along.
FAULTS = {
    "http": "errors",
    "error": "errors",
    "truncated": "errors",
    "abort": "errors",
    "short": "token_mismatch",
    "lost_token": "token_mismatch",
    "uncounted": "token_mismatch",
}


def main() -> None:
    """Measure, write, and end with 3 when a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=400, help="of each true value")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with Generator() as generator:
        values = {
            name: [_true_value(case, generator) for _ in range(options.repeats)]
            for name, case in _cases(options.requests).items()
        }
        reasons = {
            name: [asyncio.run(find(generator)) for _ in range(options.repeats)]
            for name, find in _faults().items()
        }
    missed = [
        f"{name}: {figure} is {found['error']:+.1%} off"
        for name, runs in values.items()
        for run in runs
        for figure, found in run["figures"].items()
        if abs(found["error"]) > BOUND
    ] + [
        f"{name}: found {found['checks']} in place of {found['expected']}"
        for name, runs in reasons.items()
        for found in runs
        if not found["right"]
    ]
    found = {
        "bound": BOUND,
        "repeats": options.repeats,
        "requests": options.requests,
        "worst_error": max(
            abs(figure["error"])
            for runs in values.values()
            for run in runs
            for figure in run["figures"].values()
        ),
        "values": values,
        "faults": reasons,
    }
    finish(options.out, describe(parser, found), missed)


Case = tuple[Upstream, Bench, dict[str, Sequence[float]]]


def _cases(requests: int) -> dict[str, Case]:
    """An upstream, the load, and the true values of each figure in seconds."""
    rate, stall = 100.0, (1.0, 2.0)
    busy = 0.85 / SERVICE_S
    poisson = poisson_arrivals(busy, requests, SEED)
    bursts = gamma_arrivals(busy, 4.0, requests, SEED)
    spread = poisson_arrivals(rate, requests, SEED)
    stalled = [(stall[1] - at if stall[0] <= at < stall[1] else 0.0) + 0.2 for at in spread]
    load: dict[str, Any] = {"rounds": 1, "requests": requests}
    return {
        "constant latency": (
            Upstream(ttft_s=0.25, tpot_s=0.04),
            Bench(**load, request_rate=60, max_tokens=8),
            {"ttft_ms": [0.25], "tpot_ms": [0.04], "itl_ms": [0.04], "e2e_ms": [0.25 + 7 * 0.04]},
        ),
        "M/D/1 queue, 85 % busy": (
            Upstream(ttft_s=SERVICE_S, one_at_a_time=True),
            Bench(**load, request_rate=busy, max_tokens=1),
            {"ttft_ms": _waits(poisson, SERVICE_S)},
        ),
        "bursts before one server": (
            Upstream(ttft_s=SERVICE_S, one_at_a_time=True),
            Bench(**load, request_rate=busy, max_tokens=1, arrivals="gamma", burstiness=4),
            {"ttft_ms": _waits(bursts, SERVICE_S)},
        ),
        "a stall of 1 s": (
            Upstream(ttft_s=0.2, stall=stall),
            Bench(**load, request_rate=rate, max_tokens=1),
            {"ttft_ms": stalled},
        ),
        "tokens in bursts of 4": (
            Upstream(ttft_s=0.2, tpot_s=0.04, burst=4),
            Bench(**load, request_rate=60, max_tokens=12),
            {"ttft_ms": [0.2 + 3 * 0.04], "tpot_ms": [0.04], "itl_ms": [0.16]},
        ),
    }


def _waits(arrivals_s: Sequence[float], service_s: float) -> list[float]:
    """From arrival to the end of service before one server, by Lindley's recursion."""
    free_s, found = 0.0, []
    for arrival_s in arrivals_s:
        free_s = max(arrival_s, free_s) + service_s
        found.append(free_s - arrival_s)
    return found


def _true_value(case: Case, generator: Generator) -> dict[str, Any]:
    upstream, bench, truths = case

    async def measure() -> Phase:
        async with _meter(upstream, bench, generator) as meter:
            return await meter.arrivals()

    phase = asyncio.run(measure())
    found = latencies_ms(phase.samples, seed=0)
    figures = {}
    for name, true_s in truths.items():
        for percent in PERCENTS:
            true_ms = 1000 * float(np.percentile(true_s, percent))
            value_ms = found[name][f"p{percent}"].value
            figures[f"{name} p{percent}"] = {
                "true": round(true_ms, 3),
                "measured": round(value_ms, 3),
                "error": round(value_ms / true_ms - 1, 5),
            }
    return {"figures": figures, "faults": [fault.check for fault in phase.faults]}


def _faults() -> dict[str, Callable[[Generator], Any]]:
    bench = Bench(rounds=1, requests=60, request_rate=60, max_tokens=6)
    found: dict[str, Callable[[Generator], Any]] = {}
    for fault, check in FAULTS.items():
        found[fault] = _finder(Upstream(ttft_s=0.15, fault=fault), bench, check)
    found["cached prompts"] = _finder(Upstream(ttft_s=0.15, hit_rate=0.5), bench, "contaminated")
    found["a lagging client"] = _finder(Upstream(ttft_s=0.01), bench, "client_bound", stops=True)
    found["too few requests"] = _finder(
        Upstream(ttft_s=0.15), bench.model_copy(update={"requests": 20}), "too_short"
    )
    found["a machine that slows down"] = _finder(
        Upstream(ttft_s=0.15, drift=1.3), bench.model_copy(update={"rounds": 2}), "noisy_machine"
    )
    found["nothing"] = _finder(Upstream(ttft_s=0.15), bench, None)
    return found


def _finder(
    upstream: Upstream, bench: Bench, expected: str | None, *, stops: bool = False
) -> Callable[[Generator], Any]:
    async def find(generator: Generator) -> dict[str, Any]:
        async with _meter(upstream, bench, generator) as meter:
            if stops:
                _stop_now_and_then(generator)
            phase = await meter.arrivals()
        checks = [fault.check for fault in phase.faults]
        right = checks == ([expected] if expected else [])
        return {"expected": expected, "checks": checks, "right": right}

    return find


def _stop_now_and_then(generator: Generator) -> None:
    """As a machine does that has no core left for the client."""
    assert generator.pid
    loop = asyncio.get_running_loop()
    for delay_s in (0.4, 2.0):
        loop.call_later(delay_s, os.kill, generator.pid, signal.SIGSTOP)
        loop.call_later(delay_s + 0.4, os.kill, generator.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def _meter(upstream: Upstream, bench: Bench, generator: Generator) -> AsyncIterator[Meter]:
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=serve_forever, args=(upstream, far), daemon=True)
    process.start()
    far.close()  # so that its death is seen
    try:
        async with metered(near.recv(), bench, generator) as meter:
            yield meter
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
