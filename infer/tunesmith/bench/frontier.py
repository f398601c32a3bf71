"""`tunesmith bench frontier`: quality, goodput, price and memory of every model, measured in turns.

A round starts the engine of each model once, and under each of `bench.engines` once: A, B, C, A, B,
C. What the machine does between the rounds is so in all alike. A round of a cell is kept as soon as
it is measured.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.cells import frontier_columns, frontier_remarks, frontier_row
from tunesmith.bench.choice import choose, verdict
from tunesmith.bench.figures import tokens_per_s
from tunesmith.bench.results import doubts, phase_figures, priced, reading_share, samples_of
from tunesmith.bench.rig import Rig, bench_of, hour_usd, open_rig, write_bench, write_json
from tunesmith.bench.roofline import weights_bytes
from tunesmith.bench.turns import one_round, phases, read_json
from tunesmith.config import GateError, ModelError, UserError
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.ledger import Artifact, Work
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.statistics import compare
from tunesmith.statistics.independent import ENOUGH_ROUNDS, difference_in_turns
from tunesmith.terminal import log, make_table


class _Cell(NamedTuple):
    """A model, and what its engine has in place of the recipe's settings."""

    model: str
    changed: dict[str, Any]


def run(stages: Stages) -> dict[str, Any]:
    """Measure what is not measured yet; quality is read of the evaluations that are made."""
    if hour_usd(stages) is None:
        raise UserError(f"{stages.path}: bench frontier needs a price section")
    draft = stages.bench("frontier")
    if (found := stages.store.find(draft.id)) is None:
        with contextlib.ExitStack() as opened:
            work = opened.enter_context(stages.store.write(draft, stages.recipe))
            rig = opened.enter_context(open_rig(stages))
            _measure(stages, work, rig)
        found = stages.made(draft)
    return result_of(stages, found)


def _cells(stages: Stages) -> dict[str, _Cell]:
    """What is measured, by what the table calls it: a model's own name is the recipe's settings."""
    found = {}
    for name in stages.benched("frontier"):
        found[name] = _Cell(name, {})
        for engine, change in bench_of(stages).engines.items():
            found[f"{name} · {engine}"] = _Cell(name, change.model_dump(exclude_none=True))
    return found


def _measure(stages: Stages, work: Work, rig: Rig) -> None:
    cells = _cells(stages)
    refusals: dict[str, dict[str, str]] = {}
    specs: dict[str, EngineSpec] = {}
    for name, (model, changed) in cells.items():
        try:
            require_approval(stages, model)
            spec = engine_spec(stages, model)
            specs[name] = replace(spec, settings=spec.settings.model_copy(update=changed))
        except GateError as error:
            refusals[name] = {"kind": "verification", "refused": str(error)}
    for place in range(rig.bench.rounds):
        for name, spec in specs.items():
            path = _path(work, name, place)
            if name in refusals or path.exists():
                continue
            log(f"bench frontier: round {place + 1}/{rig.bench.rounds}: {name}")
            try:
                write_json(path, one_round(rig, name, spec, work.scratch / f"{name}.log"))
            except ModelError as error:
                log(f"bench {name}: refused: {error}")
                refusals[name] = {"kind": "engine", "refused": str(error)}
    if len(refusals) == len(cells):
        first = next(iter(refusals.values()))["refused"]
        raise ModelError(f"no model of {stages.path} runs here: {first}")
    variants = {
        name: cell._asdict() | (refusals.get(name) or _entry(rig, work, name, specs[name]))
        for name, cell in cells.items()
    }
    write_bench(stages, work, "frontier", variants=variants)
    work.metrics["variants"] = {
        name: {key: value for key, value in entry.items() if key != "samples"}
        for name, entry in variants.items()
    }


def _path(work: Work, name: str, place: int) -> Path:
    return work.scratch / f"{name}.round-{place}.json"


def _entry(rig: Rig, work: Work, name: str, spec: EngineSpec) -> dict[str, Any]:
    """All rounds of a model together."""
    read = [read_json(_path(work, name, place)) for place in range(rig.bench.rounds)]
    prompts, full_queue, arrivals = phases(read)
    share = reading_share(prompts, full_queue)
    saturated = phase_figures(full_queue, rig.bench, rig.seed)
    arriving = phase_figures(arrivals, rig.bench, rig.seed)
    doubtful = doubts(full_queue, prompts, arrivals)
    at_rate = priced(arriving, rig.hour_usd, share)
    return {
        "valid": not doubtful,
        "faults": [asdict(fault) for fault in doubtful],
        **priced(saturated, rig.hour_usd, share),
        "usd_per_accepted_request": at_rate["usd_per_accepted_request"],
        "output_tokens_per_s": saturated["output_tokens_per_s"],
        "rounds_tokens_per_s": [tokens_per_s(one.samples, one.window) for one in full_queue.rounds],
        "goodput": arriving["goodput"],
        "ttft_ms": arriving["ttft_ms"],
        "tpot_ms": arriving["tpot_ms"],
        "spread": saturated["spread"],
        "weights_bytes": weights_bytes(spec.model, spec.adapter),
        "engine_bytes": max((one["engine_bytes"] for one in read if one["engine_bytes"]), default=0)
        or None,
        "load_s": min(one["load_s"] for one in read),
        "samples": samples_of(arrivals, rig.hour_usd),
    }


def result_of(stages: Stages, artifact: Artifact) -> dict[str, Any]:
    """The cells of a finished frontier, with the quality that is known now, and the choice."""
    variants = artifact.manifest.metrics["variants"]
    reference = "tuned" if "tuned" in variants else next(iter(variants))
    cells = [
        {
            "variant": name,
            **entry,
            **_quality(stages, entry, reference),
            "speed_change": _speed(entry, variants[reference]),
        }
        for name, entry in variants.items()
    ]
    chosen = choose(cells, bench_of(stages).most_loss)
    return {
        "id": artifact.id,
        "reference": reference,
        "cells": chosen,
        "verdict": verdict(chosen),
    }


def _quality(stages: Stages, entry: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """The paired change of loss against the reference, with its interval, or why there is none."""
    section, name = stages.recipe.evaluate, entry["model"]
    if section is None:
        return {"loss_change": None, "quality": "the recipe has no evaluate section"}
    own = stages.recipe.engine.kv_cache_dtype
    if entry["changed"].get("kv_cache_dtype", own) != own:
        return {"loss_change": None, "quality": f"it was evaluated with kv_cache_dtype: {own}"}
    if name == reference:
        return {"loss_change": dict.fromkeys(("value", "low", "high"), 0.0), "quality": "reference"}
    made = [stages.store.find(stages.evaluation(one).id) for one in (name, reference)]
    missing = [one for one, found in zip((name, reference), made, strict=True) if found is None]
    if missing:
        return {"loss_change": None, "quality": f"not evaluated: {', '.join(missing)}"}
    left, right = (_rows(found.root / "rows.jsonl") for found in made if found)
    found = compare(left, right, "completion_loss", section.confidence, stages.recipe.seed)
    if found is None or found.relative is None:
        return {"loss_change": None, "quality": "no row was measured for both"}
    return {"loss_change": found.relative._asdict(), "quality": "measured"}


def _speed(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float] | None:
    """The change of throughput against the reference, round by round, with its interval."""
    rounds, others = (one.get("rounds_tokens_per_s", ()) for one in (entry, reference))
    is_enough = len(rounds) == len(others) >= ENOUGH_ROUNDS and all([*rounds, *others])
    if entry is reference or not is_enough:
        return None
    return difference_in_turns(rounds, others)._asdict()


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def show(result: dict[str, Any]) -> RenderableType:
    """One line for each model, and the choice."""
    rows = [frontier_row(cell) for cell in result["cells"]]
    title = f"bench frontier · {result['id']} · against {result['reference']}"
    notes = [*frontier_remarks(result["cells"]), result["verdict"]]
    return Group(make_table(title, frontier_columns(), rows), *map(Text, notes))
