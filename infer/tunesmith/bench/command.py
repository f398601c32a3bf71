"""`tunesmith bench`: every tuned variant, one server start each, two artifacts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.client import open_session
from tunesmith.bench.measure import Target, open_meter
from tunesmith.bench.results import Run, variant_result
from tunesmith.bench.traffic import Prompt, read_prompts
from tunesmith.config import DataError, ModelError, UserError
from tunesmith.config.schema.bench import Bench
from tunesmith.engine import EngineServer, EngineSpec, engine_spec
from tunesmith.ledger import Artifact, Work, describe_environment, gpu_names
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.terminal import log, make_table

MODES = ("batch", "serve")


def run(stages: Stages, mode: str = "all") -> dict[str, Any]:
    """Measure what is not measured yet; `mode` is batch, serve or all.

    A variant is kept as soon as it is measured, so an interrupted bench goes on with the next.
    One that the engine refuses is recorded with the reason; raises ModelError when it refuses all.
    """
    modes = MODES if mode == "all" else (mode,)
    drafts = {name: stages.bench(name) for name in modes}
    missing = [name for name in modes if stages.store.find(drafts[name].id) is None]
    if missing:
        for name in stages.benchmarked:
            require_approval(stages, name)
        specs = {name: engine_spec(stages, name) for name in stages.benchmarked}
        prompts = _prompts(stages)
        with contextlib.ExitStack() as open_works:
            works = {
                name: open_works.enter_context(stages.store.write(drafts[name], stages.recipe))
                for name in missing
            }
            for work in works.values():
                work.share = 1 / len(works)
            refusals = {
                variant: reason
                for variant, spec in specs.items()
                if (reason := _measure_variant(stages, works, variant, spec, prompts))
            }
            for name, work in works.items():
                _finish(stages, name, work, refusals)
    return {"modes": {name: _summary(stages.made(draft)) for name, draft in drafts.items()}}


def show(result: dict[str, Any]) -> RenderableType:
    """One table per mode, and the doubts about any run below it."""
    parts: list[RenderableType] = []
    for mode, summary in result["modes"].items():
        rows = [_row(name, figures, mode) for name, figures in summary["variants"].items()]
        parts.append(make_table(f"bench {mode} · {summary['id']}", _columns(mode), rows))
        for name, figures in summary["variants"].items():
            if "refused" in figures:
                parts.append(Text(f"{name} cannot run here: {figures['refused']}"))
            for fault in figures.get("faults", ()):
                parts.append(Text(f"{name} is INVALID: {fault['check']}: {fault['detail']}"))
    return Group(*parts)


def _measure_variant(
    stages: Stages, works: dict[str, Work], variant: str, spec: EngineSpec, prompts: list[Prompt]
) -> str | None:
    """Leave `<variant>.json` in the scratch folder of every mode that lacks it.

    Returns why the engine refuses the variant, if it does.
    """
    wanted = {
        mode: work.scratch / f"{variant}.json"
        for mode, work in works.items()
        if not (work.scratch / f"{variant}.json").exists()
    }
    if not wanted:
        log(f"bench {variant}: measured already")
        return None
    bench, seed = _bench(stages), stages.recipe.seed
    work = next(iter(works.values()))
    started_s = time.perf_counter()
    log(f"bench {variant}: starting the engine")
    try:
        with EngineServer(spec, log_path=work.scratch / f"{variant}.log") as server:
            target = Target(variant, server.url, spec.served_name)
            load_s = server.load_s
            phases = asyncio.run(_phases(target, bench, seed, prompts, serve="serve" in wanted))
    except ModelError as error:
        log(f"bench {variant}: refused: {error}")
        return str(error)
    measured = Run(
        load_s=load_s,
        wall_s=time.perf_counter() - started_s,
        hour_usd=_hour_usd(stages),
        **phases,
    )
    for mode, path in wanted.items():
        _write_json(path, variant_result(measured, mode, bench, seed))
    return None


async def _phases(
    target: Target, bench: Bench, seed: int, prompts: list[Prompt], *, serve: bool
) -> dict[str, Any]:
    async with open_session() as session:
        meter = await open_meter(target, bench, seed, session, prompts)
        warm_up = await meter.warm_up()
        log(f"bench {target.name}: {bench.requests} requests, {bench.concurrency} in flight")
        prompts_only, full_queue = await meter.prompts_only(), await meter.full_queue()
        arrivals = None
        if serve:
            log(f"bench {target.name}: {bench.requests} requests, {bench.request_rate}/s")
            arrivals = await meter.arrivals()
    return {
        "common_prefix_tokens": meter.common_prefix_tokens,
        "warm_up": warm_up,
        "prompts": prompts_only,
        "full_queue": full_queue,
        "arrivals": arrivals,
    }


def _finish(stages: Stages, mode: str, work: Work, refusals: dict[str, str]) -> None:
    if len(refusals) == len(stages.benchmarked):
        raise ModelError(f"no model of {stages.path} runs here: {next(iter(refusals.values()))}")
    variants = {
        name: {"figures": {"refused": refusals[name]}}
        if name in refusals
        else json.loads((work.scratch / f"{name}.json").read_text(encoding="utf-8"))
        for name in stages.benchmarked
    }
    price = stages.recipe.price
    _write_json(
        work.out / "bench.json",
        {
            "schema_version": 1,
            "mode": mode,
            "bench": _bench(stages).model_dump(mode="json"),
            "price": price.model_dump(mode="json") if price else None,
            "environment": describe_environment(),
            "variants": variants,
        },
    )
    work.metrics["mode"] = mode
    work.metrics["variants"] = {name: entry["figures"] for name, entry in variants.items()}


def _bench(stages: Stages) -> Bench:
    if stages.recipe.bench is None:
        raise UserError(f"{stages.path}: this needs a bench section")
    return stages.recipe.bench


def _prompts(stages: Stages) -> list[Prompt]:
    if stages.recipe.data is None:
        raise UserError(
            f"{stages.path}: bench takes its prompts from held-out rows; add a data section"
        )
    dataset = stages.made(stages.dataset)
    prompts = read_prompts(dataset.root / "evaluation.jsonl", stages.recipe.seed)
    if not prompts:
        raise DataError(f"{dataset.root}/evaluation.jsonl has no prompt to send")
    return prompts


def _hour_usd(stages: Stages) -> float | None:
    """Price of the devices one engine holds."""
    if stages.recipe.price is None:
        return None
    devices = stages.recipe.engine.tensor_parallel_size if gpu_names() else 1
    return stages.recipe.price.gpu_hour_usd * devices


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    partial.replace(path)


def _summary(artifact: Artifact) -> dict[str, Any]:
    return {"id": artifact.id, "variants": artifact.manifest.metrics["variants"]}


def _columns(mode: str) -> list[str]:
    shared = ["model", "output tok/s", "TTFT p50 / p95 ms", "TPOT p50 / p95 ms"]
    goodput = ["goodput req/s"] if mode == "serve" else []
    return [*shared, *goodput, "USD per M in", "USD per M out", "run"]


def _row(name: str, figures: dict[str, Any], mode: str) -> list[str]:
    if "refused" in figures:
        return [name, *["–"] * (len(_columns(mode)) - 2), "refused"]
    rate = figures["output_tokens_per_s"]
    return [
        name,
        f"{rate['value']:,.0f}" if rate else "–",
        _pair(figures["ttft_ms"]),
        _pair(figures["tpot_ms"]),
        *([f"{figures['goodput']['requests_per_s']:.2f}"] if mode == "serve" else []),
        _usd(figures["usd_per_million_input_tokens"]),
        _usd(figures["usd_per_million_output_tokens"]),
        "VALID" if figures["valid"] else "INVALID",
    ]


def _pair(percentiles: dict[str, Any]) -> str:
    found = [percentiles.get(name) for name in ("p50", "p95")]
    return " / ".join(f"{interval['value']:.1f}" if interval else "–" for interval in found)


def _usd(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
