"""From the phases of one server to what `bench.json` and the manifest say about a variant. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from tunesmith.bench.bill import bill, shares_s, usd_of
from tunesmith.bench.ceiling import Ceiling
from tunesmith.bench.client import Sample
from tunesmith.bench.cost import input_share, token_costs
from tunesmith.bench.figures import (
    Throughput,
    goodput,
    idle_s,
    latencies_ms,
    round_figures,
    throughput,
)
from tunesmith.bench.measure import Phase
from tunesmith.bench.roofline import Shape, roofline
from tunesmith.bench.validity import Evidence, Fault, lag_p99_ms, spread
from tunesmith.config.schema.bench import Bench
from tunesmith.statistics import Interval
from tunesmith.statistics.independent import with_rounds


@dataclass(frozen=True)
class Machine:
    """What a variant runs on."""

    hour_usd: float | None
    """Price of the devices that the server holds."""
    ceiling: Ceiling | None = None
    """What they can do at most."""
    shape: Shape | None = None
    """What the variant asks of them."""


@dataclass(frozen=True)
class Run:
    """Everything that one start of a server gave."""

    load_s: float
    """Until the server answered."""
    wall_s: float
    """From the start of the server to its end: what is paid for."""
    common_prefix_tokens: int
    warm_up: Phase
    prompts: Phase
    full_queue: Phase
    arrivals: Phase | None
    machine: Machine


def variant_result(run: Run, mode: str, bench: Bench, seed: int) -> dict[str, Any]:
    """One variant's entry in `bench.json`: figures, bill, and every raw sample."""
    phase = run.full_queue if mode == "batch" else run.arrivals
    if phase is None:
        raise ValueError(f"nothing was measured for {mode}")
    hour_usd = run.machine.hour_usd
    return {
        "figures": _figures(run, phase, mode, bench, seed),
        "bill": [asdict(line) for line in bill(hour_usd, run.wall_s, run.load_s, _busy_s(run))],
        "samples": samples_of(phase, hour_usd),
        "prompts_only_samples": samples_of(run.prompts, hour_usd),
        "rounds": [
            {"start_s": one.window.start_s, "end_s": one.window.end_s, "wall_s": one.wall_s}
            for one in phase.rounds
        ],
        "client_late_s": [[round(late, 6) for late in one.late_s] for one in phase.rounds],
    }


def phase_figures(phase: Phase, bench: Bench, seed: int) -> dict[str, Any]:
    """What a load alone tells, whatever else was measured."""
    samples = phase.samples
    rates = throughput([(one.samples, one.window) for one in phase.rounds], seed)
    failed = sum(not sample.ok for sample in samples)
    answered = [sample for sample in samples if sample.ok]
    energy_j = _energy_j(phase.rounds)
    tokens = sum(sample.output_tokens for sample in answered)
    apart = [round_figures(one.samples, one.window) for one in phase.rounds]
    return {
        "requests": len(samples),
        "rounds": len(phase.rounds),
        "failed": failed,
        "mean_input_tokens": _mean([sample.input_tokens for sample in answered]),
        "output_tokens": _mean([sample.output_tokens for sample in answered]),
        "window_s": sum(one.window.length_s for one in phase.rounds),
        **_rates(rates, apart),
        **_plain(latencies_ms(samples, seed), apart),
        "slo": bench.slo.model_dump(),
        "goodput": asdict(goodput([one.samples for one in phase.rounds], bench.slo)),
        "spread": spread(phase.rounds),
        "energy_j": energy_j,
        "joules_per_output_token": energy_j / tokens if energy_j and tokens else None,
        "cache_hit_rate": _hit_rate(phase.rounds),
        "preemptions": sum(one.counted.num_preemptions for one in phase.rounds),
        "client_lag_p99_ms": lag_p99_ms(phase.rounds),
        "client_cpu": max(one.client_cpu for one in phase.rounds),
    }


def priced(
    found: Mapping[str, Any], hour_usd: float | None, share: float
) -> dict[str, float | None]:
    """What tokens and requests cost at the rates of `phase_figures`."""
    if found["output_tokens_per_s"] is None:
        costs = None
    else:
        rates = Throughput(
            Interval(**found["output_tokens_per_s"]),
            found["input_tokens_per_s"],
            found["requests_per_s"],
        )
        costs = token_costs(hour_usd, rates, share)
    accepted = found["goodput"]["share"]
    return {
        "input_share": share,
        "usd_per_million_input_tokens": costs.usd_per_million_input_tokens if costs else None,
        "usd_per_million_output_tokens": costs.usd_per_million_output_tokens if costs else None,
        "usd_per_request": costs.usd_per_request if costs else None,
        "usd_per_accepted_request": (
            costs.usd_per_request / accepted if costs and accepted else None
        ),
    }


def reading_share(prompts: Phase, full_queue: Phase) -> float:
    """The input's share of the price, from two phases of as many requests."""
    return input_share(
        mean(one.wall_s for one in prompts.rounds), mean(one.wall_s for one in full_queue.rounds)
    )


def doubts(
    phase: Phase, prompts: Phase | None = None, arrivals: Phase | None = None
) -> list[Fault]:
    """About a load, and about those that stand beside it: the one that its prices were split by,
    and the one with arrivals. Theirs say whose they are."""
    found = list(phase.faults)
    if prompts:
        found += [
            replace(fault, detail=f"prompts alone: {fault.detail}")
            for fault in prompts.faults
            if fault.check not in {"too_short", "client_bound"}
        ]
    if arrivals:
        found += [
            replace(fault, detail=f"at bench.request_rate: {fault.detail}")
            for fault in arrivals.faults
        ]
    return found


def samples_of(phase: Phase, hour_usd: float | None) -> list[dict[str, Any]]:
    """Every request of a load, with its round and its share of the bill."""
    return [
        _rounded(sample) | {"round": place, "usd": usd_of(hour_usd, seconds)}
        for place, one in enumerate(phase.rounds)
        for sample, seconds in zip(one.samples, shares_s(one.samples), strict=True)
    ]


def _figures(run: Run, phase: Phase, mode: str, bench: Bench, seed: int) -> dict[str, Any]:
    found = phase_figures(phase, bench, seed)
    doubtful = doubts(phase, run.prompts)
    found = {
        "valid": not doubtful,
        "faults": [asdict(fault) for fault in doubtful],
        "discarded": [[asdict(fault) for fault in one.faults] for one in phase.discarded],
        **found,
        **priced(found, run.machine.hour_usd, reading_share(run.prompts, run.full_queue)),
        "idle_s": sum(idle_s(one.samples) for one in phase.rounds),
        "load_s": run.load_s,
        "common_prefix_tokens": run.common_prefix_tokens,
        "roofline": _roofline(run),
    }
    if mode == "batch":
        return found | {"concurrency": bench.concurrency}
    return found | {"request_rate": bench.request_rate}


def _roofline(run: Run) -> dict[str, float] | None:
    """Of the full queue: the engine has nothing to wait for there."""
    machine = run.machine
    if machine.ceiling is None or machine.shape is None:
        return None
    found = [roofline(one, machine.shape, machine.ceiling) for one in run.full_queue.rounds]
    known = [one for one in found if one]
    if not known:
        return None
    return {
        "memory": mean(one.memory for one in known),
        "compute": mean(one.compute for one in known),
        **asdict(machine.ceiling),
    }


def _busy_s(run: Run) -> dict[str, float]:
    """What the requests of each load were charged with, those of discarded attempts too."""
    named = {
        "warm-up": run.warm_up,
        "prompts only": run.prompts,
        "full queue": run.full_queue,
        "arrivals": run.arrivals,
    }
    return {
        name: sum(sum(shares_s(one.samples)) for one in _attempts(phase))
        for name, phase in named.items()
        if phase
    }


def _attempts(phase: Phase) -> Iterator[Evidence]:
    for one in (phase, *phase.discarded):
        yield from one.rounds


def _rates(rates: Throughput | None, apart: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    if rates is None:
        return dict.fromkeys(("output_tokens_per_s", "input_tokens_per_s", "requests_per_s"))
    whole = with_rounds(rates.output_tokens_per_s, _column(apart, "output_tokens_per_s"))
    return {
        "output_tokens_per_s": whole._asdict(),
        "input_tokens_per_s": rates.input_tokens_per_s,
        "requests_per_s": rates.requests_per_s,
    }


def _column(apart: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """One figure of the rounds that have it."""
    return [one[name] for one in apart if name in one]


def _energy_j(rounds: Sequence[Evidence]) -> float | None:
    found = [one.energy_j for one in rounds if one.energy_j is not None]
    return sum(found) if len(found) == len(rounds) else None


def _hit_rate(rounds: Sequence[Evidence]) -> float:
    hits = sum(one.counted.prefix_cache_hits for one in rounds)
    return hits / max(1.0, sum(one.counted.prefix_cache_queries for one in rounds))


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else 0.0


def _plain(
    latencies: Mapping[str, Mapping[str, Interval]], apart: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    return {
        name: {
            percent: with_rounds(interval, _column(apart, f"{name} {percent}"))._asdict()
            for percent, interval in intervals.items()
        }
        for name, intervals in latencies.items()
    }


def _rounded(sample: Sample) -> dict[str, Any]:
    """A sample to the microsecond."""
    found = asdict(sample)
    for name in ("intended_s", "sent_s", "ended_s"):
        found[name] = round(found[name], 6)
    return found | {"piece_s": [round(moment, 6) for moment in sample.piece_s]}
