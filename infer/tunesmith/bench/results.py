"""From the phases of one server to what `bench.json` and the manifest say about a variant. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.bench.client import Sample
from tunesmith.bench.cost import bill, input_share, token_costs
from tunesmith.bench.figures import goodput, idle_s, latencies_ms, throughput
from tunesmith.bench.measure import Phase
from tunesmith.bench.validity import lag_p99_ms
from tunesmith.config.schema.bench import Bench
from tunesmith.statistics import Interval


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
    hour_usd: float | None
    """Price of the devices that the server holds."""


def variant_result(run: Run, mode: str, bench: Bench, seed: int) -> dict[str, Any]:
    """One variant's entry in `bench.json`: figures, bill, and every raw sample."""
    phase = run.full_queue if mode == "batch" else run.arrivals
    if phase is None:
        raise ValueError(f"nothing was measured for {mode}")
    return {
        "figures": _figures(run, phase, mode, bench, seed),
        "bill": [asdict(line) for line in bill(run.hour_usd, run.wall_s, _parts_s(run))],
        "samples": [_rounded(sample) for sample in phase.evidence.samples],
        "prompts_only_samples": [_rounded(sample) for sample in run.prompts.evidence.samples],
        "client_late_s": [round(late, 6) for late in phase.evidence.late_s],
    }


def _figures(run: Run, phase: Phase, mode: str, bench: Bench, seed: int) -> dict[str, Any]:
    evidence, samples = phase.evidence, phase.evidence.samples
    doubts = phase.faults + [
        fault for fault in run.prompts.faults if fault.check not in {"too_short", "client_bound"}
    ]
    rates = throughput(samples, evidence.window, seed)
    share = input_share(run.prompts.wall_s, run.full_queue.wall_s)
    costs = token_costs(run.hour_usd, rates, share) if rates else None
    failed = sum(not sample.ok for sample in samples)
    answered = max(1, len(samples) - failed)
    found = {
        "valid": not doubts,
        "faults": [asdict(fault) for fault in doubts],
        "discarded": [[asdict(fault) for fault in attempt] for attempt in phase.discarded],
        "requests": len(samples),
        "failed": failed,
        "mean_input_tokens": sum(sample.input_tokens for sample in samples) / answered,
        "output_tokens": bench.max_tokens,
        "window_s": evidence.window.length_s,
        "output_tokens_per_s": rates.output_tokens_per_s._asdict() if rates else None,
        "input_tokens_per_s": rates.input_tokens_per_s if rates else None,
        "requests_per_s": rates.requests_per_s if rates else None,
        **_plain(latencies_ms(samples, seed)),
        "input_share": share,
        "usd_per_million_input_tokens": costs.usd_per_million_input_tokens if costs else None,
        "usd_per_million_output_tokens": costs.usd_per_million_output_tokens if costs else None,
        "usd_per_request": costs.usd_per_request if costs else None,
        "idle_s": idle_s(samples),
        "load_s": run.load_s,
        "cache_hit_rate": evidence.counted.hit_rate,
        "common_prefix_tokens": run.common_prefix_tokens,
        "preemptions": evidence.counted.num_preemptions,
        "client_lag_p99_ms": lag_p99_ms(evidence),
        "client_cpu": evidence.client_cpu,
    }
    if mode == "batch":
        return found | {"concurrency": bench.concurrency}
    return found | {
        "request_rate": bench.request_rate,
        "slo": bench.slo.model_dump(),
        "goodput": asdict(goodput(samples, bench.slo)),
    }


def _parts_s(run: Run) -> dict[str, float]:
    parts = {
        "load": run.load_s,
        "warm-up": run.warm_up.wall_s,
        "prompts only": run.prompts.wall_s,
        "full queue": run.full_queue.wall_s,
    }
    if run.arrivals:
        idle = idle_s(run.arrivals.evidence.samples)
        parts |= {"arrivals": run.arrivals.wall_s - idle, "idle between arrivals": idle}
    return parts


def _plain(latencies: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    return {
        name: {percent: interval._asdict() for percent, interval in intervals.items()}
        for name, intervals in latencies.items()
    }


def _rounded(sample: Sample) -> dict[str, Any]:
    """A sample to the microsecond."""
    found = asdict(sample)
    for name in ("intended_s", "sent_s", "ended_s"):
        found[name] = round(found[name], 6)
    return found | {"piece_s": [round(moment, 6) for moment in sample.piece_s]}
