"""`report.html`: one file that needs no network, readable on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.config import dump_recipe
from tunesmith.ledger import describe_environment
from tunesmith.pipeline import Stages
from tunesmith.report import figures as say
from tunesmith.report.contents import Contents, gather
from tunesmith.report.fidelity import line
from tunesmith.report.plots import plots
from tunesmith.report.quantization import quantization_plots
from tunesmith.report.render import render_page
from tunesmith.report.table import row

REPORT = "report.html"


def write_report(stages: Stages, out: Path, timings: Mapping[str, float]) -> Path:
    """Write the page into the folder `out` and return its path.

    `timings` are the wall seconds of this run by step. Whatever has not been made is left out,
    with a line that names the command that makes it.
    """
    contents = gather(stages)
    groups = {
        "plots": plots(contents),
        "checkpoint_plots": quantization_plots(contents.checkpoints),
    }
    return render_page("report.html.jinja", out / REPORT, _facts(contents, timings), groups)


def _facts(contents: Contents, timings: Mapping[str, float]) -> dict[str, Any]:
    stages = contents.stages
    recipe = stages.recipe
    machine = describe_environment()
    costs = [made.artifact.manifest.cost for made in contents.lineage]
    rows = [row(variant) for variant in contents.variants]
    return {
        "name": recipe.name,
        "path": stages.path,
        "lead": _lead(contents),
        "written_at": datetime.now(UTC),
        "hardware": ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cpu_count']} cores",
        "device_s": sum(cost.device_seconds for cost in costs),
        "usd": sum(cost.usd for cost in costs if cost.usd is not None) if recipe.price else None,
        "hour_usd": recipe.price.gpu_hour_usd if recipe.price else None,
        "confidence": contents.confidence,
        "tiles": _tiles(contents),
        "rows": rows,
        "doubts": [doubt for found in rows for doubt in found.doubts],
        "missing": contents.missing,
        "checkpoints": [
            {
                "size": say.size(one.size_bytes),
                "of_parent": f"{one.size_bytes / one.parent_bytes:.0%}",
                "line": line(one.name, one.found),
            }
            for one in contents.checkpoints
        ],
        "parent_engine": _parent_engine(contents),
        "lineage": contents.lineage,
        "timings": timings,
        "recipe": dump_recipe(recipe),
        "machine": {
            key: value for key, value in machine.items() if key not in ("versions", "gpus")
        },
        "versions": machine["versions"],
    }


def _parent_engine(contents: Contents) -> dict[str, str] | None:
    """What the parent took beside its checkpoints."""
    for one in contents.checkpoints:
        metrics = one.found["metrics"]
        if metrics and metrics["loads"]:
            engine, speed = metrics["parent_engine"], metrics["speed"]
            return {
                "loaded": say.size(engine["loaded_bytes"]),
                "peak": say.size(engine["peak_bytes"]),
                "load": say.duration(engine["load_s"]),
                "alone": f"{speed['batch_1']['parent_tokens_per_s']['value']:,.0f}",
                "full": f"{speed['saturation']['parent_tokens_per_s']['value']:,.0f}",
                "requests": str(speed["saturation"]["requests"]),
            }
    return None


_METHODS = {
    "lora": "fine-tuned with LoRA",
    "qlora": "fine-tuned with QLoRA",
    "full": "fine-tuned in full",
}


def _lead(contents: Contents) -> str:
    """What this is, in one sentence."""
    recipe = contents.stages.recipe
    source = recipe.model.base
    if source is None:
        return "A new model, trained on text."
    name = Path(source).name if Path(source).is_dir() else source
    method = f", {_METHODS[recipe.train.method]}" if recipe.train else ""
    *most, last = [variant.name for variant in contents.variants]
    return f"{name}{method}: {' and '.join(filter(None, [', '.join(most), last]))}."


def _tiles(contents: Contents) -> list[dict[str, str]]:
    """The few figures that a reader wants first, each with its model and its uncertainty."""
    by_name = {variant.name: variant for variant in contents.variants}
    found: list[dict[str, str]] = []
    tuned = by_name.get("tuned") or by_name.get("adapter")
    if tuned and tuned.change and tuned.change.against == "base":
        found.append(
            {
                "figure": say.percent(tuned.change.relative.value),
                "label": f"held-out loss, {tuned.name} against base",
                "detail": say.percent_bounds(tuned.change.relative),
            }
        )
    last = contents.variants[-1] if contents.variants else None
    if last and last.change and last.change.against == "tuned":
        digits = say.change_digits(last.change.relative)
        found.append(
            {
                "figure": say.percent(last.change.relative.value, digits),
                "label": f"held-out loss, {last.name} against tuned",
                "detail": say.percent_bounds(last.change.relative, digits),
            }
        )
    return found + _bench_tiles(contents)


def _bench_tiles(contents: Contents) -> list[dict[str, str]]:
    found = []
    batches = [
        (variant.name, variant.bench["batch"])
        for variant in contents.variants
        if variant.bench.get("batch", {}).get("output_tokens_per_s")
    ]
    if batches:
        name, best = max(batches, key=lambda pair: pair[1]["output_tokens_per_s"]["value"])
        found.append(
            {
                "figure": f"{best['output_tokens_per_s']['value']:,.0f} tok/s",
                "label": f"most output with a full queue, {name}",
                "detail": f"{best['concurrency']} requests in flight",
            }
        )
    priced = [
        (name, batch["usd_per_million_output_tokens"], batch["usd_per_million_input_tokens"])
        for name, batch in batches
        if batch.get("usd_per_million_output_tokens")
    ]
    if priced:
        name, out_usd, in_usd = min(priced, key=lambda entry: entry[1])
        found.append(
            {
                "figure": say.usd(out_usd),
                "label": f"cheapest million output tokens, {name}",
                "detail": f"{say.usd(in_usd)} per million input tokens",
            }
        )
    return found
