"""`tunesmith bench`: every tuned variant, one server start each, two artifacts."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.cells import invalid, pair, usd
from tunesmith.bench.measure import Meter
from tunesmith.bench.results import Run, variant_result
from tunesmith.bench.rig import Rig, on_server, open_rig, write_bench, write_json
from tunesmith.bench.worth import sentence, worth
from tunesmith.config import ModelError
from tunesmith.config.schema.bench import Bench
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.ledger import Artifact, Work
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
        with contextlib.ExitStack() as opened:
            works = {
                name: opened.enter_context(stages.store.write(drafts[name], stages.recipe))
                for name in missing
            }
            for work in works.values():
                work.share = 1 / len(works)
            rig = opened.enter_context(open_rig(stages))
            refusals = {
                variant: reason
                for variant, spec in specs.items()
                if (reason := _measure_variant(rig, works, variant, spec))
            }
            for name, work in works.items():
                _finish(stages, name, work, refusals)
    return {"modes": {name: _summary(stages, stages.made(draft)) for name, draft in drafts.items()}}


def show(result: dict[str, Any]) -> RenderableType:
    """One table per mode, and the doubts about any run below it."""
    parts: list[RenderableType] = []
    for mode, summary in result["modes"].items():
        rows = [_row(name, figures, mode) for name, figures in summary["variants"].items()]
        parts.append(make_table(f"bench {mode} · {summary['id']}", _columns(mode), rows))
        for name, figures in summary["variants"].items():
            if "refused" in figures:
                parts.append(Text(f"{name} cannot run here: {figures['refused']}"))
            parts += [Text(doubt) for doubt in invalid(name, figures.get("faults", ()))]
        parts += [Text(sentence(*found)) for found in summary["economics"].items()]
    return Group(*parts)


def _measure_variant(
    rig: Rig, works: dict[str, Work], variant: str, spec: EngineSpec
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
    log_path = next(iter(works.values())).scratch / f"{variant}.log"

    async def phases(meter: Meter) -> dict[str, Any]:
        return await _phases(meter, rig.bench, serve="serve" in wanted)

    try:
        measured = on_server(rig, variant, spec, log_path, phases)
    except ModelError as error:
        log(f"bench {variant}: refused: {error}")
        return str(error)
    run = Run(
        load_s=measured.load_s,
        wall_s=measured.wall_s,
        machine=rig.machine(spec),
        **measured.found,
    )
    for mode, path in wanted.items():
        write_json(path, variant_result(run, mode, rig.bench, rig.seed))
    return None


async def _phases(meter: Meter, bench: Bench, *, serve: bool) -> dict[str, Any]:
    name = meter.target.name
    warm_up = await meter.warm_up()
    log(f"bench {name}: {bench.requests} requests, {bench.concurrency} in flight")
    prompts_only, full_queue = await meter.prompts_only(), await meter.full_queue()
    arrivals = None
    if serve:
        log(f"bench {name}: {bench.requests} requests, {bench.request_rate}/s")
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
    asked = price.model_dump(mode="json") if price else None
    write_bench(stages, work, mode, price=asked, variants=variants)
    work.metrics["variants"] = {name: entry["figures"] for name, entry in variants.items()}


def _summary(stages: Stages, artifact: Artifact) -> dict[str, Any]:
    variants = artifact.manifest.metrics["variants"]
    found = {name: worth(stages, name, figures) for name, figures in variants.items()}
    return {
        "id": artifact.id,
        "variants": variants,
        "economics": {name: value for name, value in found.items() if value},
    }


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
        pair(figures["ttft_ms"]),
        pair(figures["tpot_ms"]),
        *([f"{figures['goodput']['requests_per_s']:.2f}"] if mode == "serve" else []),
        usd(figures["usd_per_million_input_tokens"]),
        usd(figures["usd_per_million_output_tokens"]),
        "VALID" if figures["valid"] else "INVALID",
    ]
