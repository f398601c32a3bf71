"""`tunesmith bench train`: how fast a recipe trains here, against the device's own ceiling.

Real steps of the real loop, on the recipe's model and rows or on random ones of a known shape.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.config import UserError
from tunesmith.ledger import describe_environment
from tunesmith.ledger.store import Work
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table
from tunesmith.train.libraries import load_libraries
from tunesmith.train.workload import PROFILED_STEPS, Workload

_FIGURES_FILE, _PROFILE_FILE = "bench.json", "profile.txt"


def run(stages: Stages, **workload: Any) -> dict[str, Any]:
    """Measure, unless the same was measured on this machine before."""
    train = stages.recipe.train
    if train is None:
        raise UserError(f"{stages.path}: this needs a train section")
    work_to_do = Workload(**workload)
    work_to_do.check(stages)
    load_libraries(train)
    from tunesmith.train.ranks import join, write_together

    accelerator = join()
    if work_to_do.peer and accelerator.num_processes > 1:
        raise UserError("--peer: a peer is compared on one device; start one process")
    draft = stages.bench_train(asdict(work_to_do))
    if stages.store.find(draft.id) is None:
        with write_together(stages, draft) as work:
            figures = _measure(stages, work_to_do, work, accelerator)
            if accelerator.is_main_process:
                report = {"schema_version": 1, "environment": describe_environment(), **figures}
                text = json.dumps(report, allow_nan=False, indent=1)
                (work.out / _FIGURES_FILE).write_text(text + "\n", encoding="utf-8")
            work.metrics |= {"mode": "train", **figures}
    found = stages.made(draft)
    return {"id": found.id, "path": str(found.folder), **found.manifest.metrics}


def show(result: dict[str, Any]) -> RenderableType:
    """The rates with their range over the rounds, and the peer's beside them."""
    peer = result["peer"]
    rows = [
        (name, _spread(result[key]), *([_spread(peer[key])] if peer else []))
        for name, key in _RATES.items()
    ]
    rows.append(
        (
            "peak memory, GiB",
            f"{result['peak_memory_gib']:.2f}",
            *([f"{peer['peak_memory_gib']:.2f}"] if peer else []),
        )
    )
    alone = [
        ("useful TFLOP/s", result["useful_tflops_per_s"], "{:,.2f}"),
        ("matrix product here, TFLOP/s", result["ceiling_tflops_per_s"], "{:,.2f}"),
        ("share of that", result["share_of_ceiling"], "{:.1%}"),
        ("MFU (share of the data sheet's peak)", result["mfu"], "{:.1%}"),
        ("loss of the last round, nats", result["final_loss"], "{:.4f}"),
        ("gradient norm", result["grad_norm"], "{:.4f}"),
        ("warm-up, s", result["warmup_s"], "{:,.1f}"),
    ]
    blank = [""] if peer else []
    rows += [
        (name, "–" if value is None else shape.format(value), *blank)
        for name, value, shape in alone
    ]
    columns = ["median (lowest – highest)", "tunesmith", *([peer["name"]] if peer else [])]
    parts: list[RenderableType] = [make_table(f"bench train · {result['id']}", columns, rows)]
    if peer:
        parts.append(
            Text(
                f"tunesmith is {_spread(peer['speed_ratio'], '{:.2f}')} times as fast, with "
                f"{peer['memory_ratio']:.2f} times the memory"
            )
        )
    return Group(*parts, Text(result["path"], style="dim"))


_RATES = {"supervised tokens/s": "supervised_tokens_per_s", "tokens/s": "tokens_per_s"}


def _measure(stages: Stages, workload: Workload, work: Work, accelerator: Any) -> dict[str, Any]:
    from tunesmith.train import useful
    from tunesmith.train.jobs import prepare_jobs
    from tunesmith.train.measure import Meter, Round

    started_s = time.perf_counter()
    job, peer_job = prepare_jobs(stages, workload, work, accelerator)
    load_s = time.perf_counter() - started_s
    ceiling = useful.matmul_tflops(job.dtype, accelerator.device)
    peak = useful.peak_tflops(job.dtype, accelerator.device)
    run_peer = _peer(stages, peer_job) if peer_job else None
    meter = Meter(job, accelerator)
    log(f"bench train: {workload.warmup_steps} steps of warm-up")
    warmup_s = meter.warm_up(workload.warmup_steps)
    ours: list[Round] = []
    theirs: list[dict[str, Any]] = []
    for at in range(workload.rounds):
        ours.append(meter.round(workload.steps))
        tokens_per_s = ours[-1].tokens / ours[-1].seconds
        log(f"bench train: round {at + 1}/{workload.rounds}: {tokens_per_s:,.0f} tokens/s")
        if run_peer:
            meter.leave_memory()
            theirs.append(run_peer())
    peak_memory_gib = meter.peak_memory_gib
    if workload.profile and accelerator.is_main_process:
        (work.out / _PROFILE_FILE).write_text(meter.profile(PROFILED_STEPS), encoding="utf-8")
    figures = _rates([asdict(one) for one in ours])
    rates = [one.useful_flops / one.seconds / 1e12 for one in ours if one.useful_flops is not None]
    # All ranks share the work, so each has its part of the useful operations.
    rate = statistics.median(rates) / accelerator.num_processes if rates else None
    figures |= {
        "useful_tflops_per_s": rate,
        "ceiling_tflops_per_s": ceiling,
        "share_of_ceiling": rate / ceiling if rate else None,
        "mfu": rate / peak if rate and peak else None,
        "peak_memory_gib": peak_memory_gib,
        "final_loss": ours[-1].loss,
        "grad_norm": ours[-1].grad_norm,
        "load_s": load_s,
        "warmup_s": warmup_s,
        "rounds": [asdict(one) for one in ours],
    }
    return figures | {"peer": _beside(figures, theirs) if theirs else None}


def _peer(stages: Stages, job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from tunesmith.train.peer import find_trl, run_trl

    environment = find_trl(stages.store.folder / "peers")

    def run_once() -> dict[str, Any]:
        found = run_trl(job, environment)
        log(f"bench train: trl: {found['tokens'] / found['seconds']:,.0f} tokens/s")
        return found

    return run_once


def _rates(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{name}_per_s": _summary([one[name] / one["seconds"] for one in rounds])
        for name in ("supervised_tokens", "tokens")
    }


def _beside(ours: Mapping[str, Any], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The peer's figures, and our speed over the peer's round by round."""
    memory_gib = max(one["peak_memory_gib"] for one in theirs)
    key = "supervised_tokens"
    ratios = [
        (our[key] / our["seconds"]) / (their[key] / their["seconds"])
        for our, their in zip(ours["rounds"], theirs, strict=True)
    ]
    return {
        "name": "trl",
        **_rates(theirs),
        "peak_memory_gib": memory_gib,
        "speed_ratio": _summary(ratios),
        "memory_ratio": ours["peak_memory_gib"] / memory_gib,
        "rounds": theirs,
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _spread(found: Mapping[str, float], shape: str = "{:,.0f}") -> str:
    low, high = shape.format(found["lowest"]), shape.format(found["highest"])
    return f"{shape.format(found['median'])} ({low} – {high})"
