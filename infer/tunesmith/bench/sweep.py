"""`tunesmith bench sweep`: a model under many loads, and the highest rate that keeps the promise.

Every point is kept as soon as it is measured, so that an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.cells import pair, usd
from tunesmith.bench.measure import Meter, Phase
from tunesmith.bench.results import doubts, phase_figures, priced, reading_share, samples_of
from tunesmith.bench.rig import Rig, on_server, open_rig, write_bench, write_json
from tunesmith.bench.search import bracket, next_rate
from tunesmith.bench.worth import sentence, worth
from tunesmith.config import ModelError
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.ledger import Artifact, Work
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.terminal import log, make_table

LEAST_S = 5.0  # of arrivals at one rate: a queue that grows needs time to show it
_FIRST_SHARE = 0.7  # of the rate at saturation: where the search begins


def run(stages: Stages) -> dict[str, Any]:
    """Measure what is not measured yet. Raises ModelError when the engine refuses every model."""
    draft = stages.bench("sweep")
    if found := stages.store.find(draft.id):
        return _summary(stages, found)
    for name in stages.benchmarked:
        require_approval(stages, name)
    specs = {name: engine_spec(stages, name) for name in stages.benchmarked}
    with contextlib.ExitStack() as opened:
        work = opened.enter_context(stages.store.write(draft, stages.recipe))
        rig = opened.enter_context(open_rig(stages))
        variants = {name: _variant(rig, work, name, spec) for name, spec in specs.items()}
        refusals = [found["refused"] for found in variants.values() if "refused" in found]
        if len(refusals) == len(variants):
            raise ModelError(f"no model of {stages.path} runs here: {refusals[0]}")
        write_bench(stages, work, "sweep", hour_usd=rig.hour_usd, variants=variants)
        work.metrics["variants"] = {name: _brief(found) for name, found in variants.items()}
    return _summary(stages, stages.made(draft))


class Points:
    """What was measured of one model, on disk after every point."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )

    async def get(
        self, name: str, measure: Callable[[], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """The point of this name, measured if it is not known."""
        if name not in self._known:
            started_s = time.perf_counter()
            found = await measure()
            found["seconds"] = time.perf_counter() - started_s
            self._known[name] = found
            write_json(self._path, self._known)
        return self._known[name]

    @property
    def spent_s(self) -> float:
        """Over all attempts."""
        return sum(float(point["seconds"]) for point in self._known.values())


def _variant(rig: Rig, work: Work, name: str, spec: EngineSpec) -> dict[str, Any]:
    done = work.scratch / f"{name}.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    points = Points(work.scratch / f"{name}.points.json")

    async def measure(meter: Meter) -> dict[str, Any]:
        return await sweep(meter, rig, points)

    try:
        found = on_server(rig, name, spec, work.scratch / f"{name}.log", measure).found
    except ModelError as error:
        log(f"bench {name}: refused: {error}")
        return {"refused": str(error)}
    write_json(done, found)
    return found


async def sweep(meter: Meter, rig: Rig, points: Points) -> dict[str, Any]:
    """Saturation, every concurrency and rate of the recipe, then the search."""
    bench = rig.bench
    await meter.warm_up()
    saturation = await points.get("saturation", partial(_saturation, meter, rig))
    share = saturation["figures"]["input_share"]

    async def concurrency(places: int) -> dict[str, Any]:
        log(f"bench {meter.target.name}: {places} in flight")
        phase = await meter.full_queue(places, rounds=1)
        return {"concurrency": places, **_point(phase, rig, share)}

    async def rate(per_s: float, rounds: int = 1) -> dict[str, Any]:
        log(f"bench {meter.target.name}: {per_s:.3g} requests/s")
        phase = await meter.arrivals(per_s, rounds, LEAST_S)
        return {"request_rate": per_s, **_point(phase, rig, share)}

    by_concurrency = [
        await points.get(f"concurrency {places}", partial(concurrency, places))
        for places in sorted(set(bench.concurrencies))
    ]
    by_rate = {
        per_s: await points.get(f"rate {per_s:.6g}", partial(rate, per_s))
        for per_s in sorted(set(bench.rates))
    }
    best, ended = await _search(points, by_rate, rate, saturation, rig)
    return {
        "saturation": saturation,
        "concurrencies": by_concurrency,
        "rates": [by_rate[per_s] for per_s in sorted(by_rate)],
        "best": best,
        "search": ended,
        "seconds": points.spent_s,
    }


async def _search(
    points: Points,
    by_rate: dict[float, dict[str, Any]],
    measure: Callable[..., Awaitable[dict[str, Any]]],
    saturation: dict[str, Any],
    rig: Rig,
) -> tuple[dict[str, Any] | None, str]:
    """The highest rate that keeps the promise, measured again in rounds; and how it was found."""
    bench = rig.bench
    start = _FIRST_SHARE * (saturation["figures"]["requests_per_s"] or bench.request_rate)
    while True:
        kept = {per_s: keeps(point) for per_s, point in by_rate.items()}
        wanted = next_rate(kept, start, bench.search_tolerance)
        if wanted is None:
            ended = "found"
            break
        name = f"rate {wanted:.6g}"
        if points.spent_s >= bench.search_s:
            ended = "out of time"
            break
        by_rate[wanted] = await points.get(name, partial(measure, wanted))
    low, _ = bracket(kept)
    if low is None:
        return None, "none keeps it" if ended == "found" else ended
    best = await points.get(f"best {low:.6g}", partial(measure, low, bench.rounds))
    return best, ended


def keeps(point: dict[str, Any]) -> bool:
    """Whether a load was within the promise; one whose answers were not whole was not."""
    checks = {fault["check"] for fault in point["figures"]["faults"]}
    kept: bool = point["figures"]["goodput"]["slo_kept"]
    return kept and not checks & {"errors", "token_mismatch"}


async def _saturation(meter: Meter, rig: Rig) -> dict[str, Any]:
    log(f"bench {meter.target.name}: a full queue of {rig.bench.concurrency}")
    prompts, phase = await meter.prompts_only(), await meter.full_queue()
    share = reading_share(prompts, phase)
    return {"concurrency": rig.bench.concurrency, **_point(phase, rig, share, prompts)}


def _point(phase: Phase, rig: Rig, share: float, prompts: Phase | None = None) -> dict[str, Any]:
    found = phase_figures(phase, rig.bench, rig.seed)
    doubtful = doubts(phase, prompts)
    return {
        "figures": {
            "valid": not doubtful,
            "faults": [asdict(fault) for fault in doubtful],
            **found,
            **priced(found, rig.hour_usd, share),
        },
        "samples": samples_of(phase, rig.hour_usd),
    }


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """A variant without its samples."""
    if "refused" in found:
        return found

    def bare(point: dict[str, Any] | None) -> dict[str, Any] | None:
        return point and {key: value for key, value in point.items() if key != "samples"}

    return {
        **{name: bare(found[name]) for name in ("saturation", "best")},
        **{name: [bare(point) for point in found[name]] for name in ("concurrencies", "rates")},
        "search": found["search"],
        "seconds": found["seconds"],
    }


def _summary(stages: Stages, artifact: Artifact) -> dict[str, Any]:
    """With what a request costs at saturation, and at the rate that keeps the promise."""
    variants = artifact.manifest.metrics["variants"]
    found: dict[str, dict[str, Any]] = {}
    for name, points in variants.items():
        for at in ("saturation", "best"):
            if (point := points.get(at)) and (value := worth(stages, name, point["figures"])):
                found.setdefault(name, {})[at] = value
    return {"id": artifact.id, "variants": variants, "economics": found}


def show(result: dict[str, Any]) -> RenderableType:
    """One table per model: every load, and the rate that keeps the promise."""
    parts: list[RenderableType] = []
    columns = [
        "load", "output tok/s", "requests/s", "TTFT p50 / p95 ms", "TPOT p50 / p95 ms", "good",
        "USD per M in", "USD per M out", "run",
    ]  # fmt: skip
    for name, found in result["variants"].items():
        if "refused" in found:
            parts.append(Text(f"{name} cannot run here: {found['refused']}"))
            continue
        points = [found["saturation"], *found["concurrencies"], *found["rates"]]
        title = f"bench sweep · {name} · {result['id']}"
        parts.append(make_table(title, columns, [_row(point) for point in points]))
        parts.append(Text(_verdict(found)))
        for at, value in result["economics"].get(name, {}).items():
            where = "At that rate" if at == "best" else "At saturation"
            parts.append(Text(f"{where}, {sentence(name, value)}"))
    return Group(*parts)


def _verdict(found: dict[str, Any]) -> str:
    best = found["best"]
    if best is None:
        return f"No rate keeps the promise ({found['search']})."
    share = best["figures"]["goodput"]["share"]
    unsure = "" if found["search"] == "found" else f"; the search ended {found['search']}"
    again = "" if keeps(best) else ", which the repetition broke"
    return (
        f"{best['request_rate']:.3g} requests/s is the most that keeps the promise{again}: "
        f"{share:.1%} of {best['figures']['requests']} in {best['figures']['rounds']} "
        f"rounds{unsure}."
    )


def _row(point: dict[str, Any]) -> list[str]:
    figures = point["figures"]
    load = (
        f"{point['request_rate']:.4g}/s"
        if "request_rate" in point
        else f"{point['concurrency']} in flight"
    )
    rate = figures["output_tokens_per_s"]
    return [
        load,
        f"{rate['value']:,.0f}" if rate else "–",
        f"{figures['requests_per_s']:.2f}" if rate else "–",
        pair(figures["ttft_ms"]),
        pair(figures["tpot_ms"]),
        f"{figures['goodput']['share']:.1%}",
        usd(figures["usd_per_million_input_tokens"]),
        usd(figures["usd_per_million_output_tokens"]),
        "VALID" if figures["valid"] else "INVALID: " + figures["faults"][0]["check"],
    ]
