"""Results of benchmarks that never ran, for what reads them."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import arrivals_window
from tunesmith.bench.measure import Phase
from tunesmith.bench.results import phase_figures, priced, samples_of
from tunesmith.bench.validity import Evidence, faults
from tunesmith.config.schema.bench import Bench
from tunesmith.ledger import describe_environment

BENCH = Bench(requests=60, request_rate=7.0)


def phase(seed: int, rate: float = 7.0, speed: float = 1.0, requests: int = 60) -> Phase:
    """Two rounds before one server that takes 0.1 s for each request."""
    rounds = []
    for place in range(2):
        own = random.Random(10 * seed + place)
        arrival_s = free_s = 0.0
        samples = []
        for index in range(requests):
            start_s = max(arrival_s, free_s)
            free_s = start_s + own.gammavariate(20, 0.1 / 20) / speed
            pieces = tuple(start_s + (free_s - start_s) * n / 16 for n in range(1, 17))
            samples.append(
                Sample(
                    index, arrival_s, arrival_s, free_s, pieces, (1,) * 16, 20, 16, "length", None,
                    16,
                )
            )  # fmt: skip
            arrival_s += own.expovariate(rate)
        counted = Counters(20 * requests, 16 * requests, 20 * requests, 0, 0, 200)
        window, wall_s = arrivals_window(samples), free_s
        rounds.append(Evidence(samples, counted, 2, [0.001] * 50, 0.2, window, wall_s))
    return Phase(tuple(rounds), faults(rounds))


def entry(found: Phase) -> dict[str, Any]:
    """A variant of `bench.json`."""
    figures = phase_figures(found, BENCH, 0)
    return {
        "figures": {
            "valid": not found.faults,
            "faults": [asdict(fault) for fault in found.faults],
            **figures,
            **priced(figures, 3.6, 0.2),
            "roofline": {"memory": 0.4, "compute": 0.1},
        },
        "samples": samples_of(found, 3.6),
    }


def serve() -> dict[str, Any]:
    """Of bench serve."""
    variants: dict[str, Any] = {
        name: entry(phase(seed, speed=speed))
        for seed, (name, speed) in enumerate({"tuned": 1.0, "w8a8-int8": 1.3}.items())
    }
    variants["fp8-dynamic"] = {"figures": {"refused": "this device has no FP8"}}
    return _found("serve", variants)


def sweep() -> dict[str, Any]:
    """Of bench sweep."""
    rates = [
        {"request_rate": rate, **entry(phase(int(rate), rate))}
        for rate in (2.0, 4.0, 6.0, 8.0, 9.0)
    ]
    places = [
        {"concurrency": count, **entry(phase(count, 9.0, 1 + 0.2 * count))} for count in (1, 2, 4)
    ]
    found = {
        "saturation": {"concurrency": 8, **entry(phase(1, 9.0, 2.2))},
        "rates": rates,
        "concurrencies": places,
        "best": rates[2],
        "search": "found",
    }
    return _found("sweep", {"tuned": found})


def frontier() -> dict[str, Any]:
    """Of bench frontier, with the cells that its command makes."""
    losses = {"base": 0.21, "tuned": 0.0, "w8a8-int8": 0.001, "w4a16": 0.009}
    variants, cells = {}, []
    for place, (name, loss) in enumerate(losses.items()):
        one = entry(phase(place, speed=1 + 0.3 * place))
        variants[name] = {"samples": one["samples"]}
        speeds = [0.3 * place + change for change in (-0.1027, 0.0, 0.1027)]
        cells.append(
            {
                "variant": name,
                **one["figures"],
                "loss_change": {"value": loss, "low": loss - 0.002, "high": loss + 0.002},
                "speed_change": dict(zip(("low", "value", "high"), speeds, strict=True)),
                "usd_per_million_output_tokens": 4.0 / (1 + place),
                "weights_bytes": 2**24 // (1 + place),
                "engine_bytes": 2**30,
                "keeps_quality": loss < 0.02,
                "keeps_slo": True,
                "pareto": name in ("tuned", "w8a8-int8", "w4a16"),
                "quality": "measured",
            }
        )
    cells.append({"variant": "nvfp4", "refused": "this device has no FP4", "kind": "engine"})
    return _found("frontier", variants) | {"cells": cells, "verdict": "w4a16 is the cheapest."}


def _found(mode: str, variants: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "mode": mode,
        "bench": BENCH.model_dump(mode="json"),
        "environment": describe_environment(),
        "variants": variants,
    }
