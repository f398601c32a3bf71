"""`tunesmith bench report ID`: one page of HTML that needs no network, of any benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.bench.cells import (
    NOTHING,
    frontier_columns,
    frontier_remarks,
    frontier_row,
    invalid,
    pair,
    settings_columns,
    settings_rows,
)
from tunesmith.bench.frontier import result_of
from tunesmith.bench.plots import by_concurrency, by_rate, distribution, pareto, timeline
from tunesmith.bench.settings import advice, remarks
from tunesmith.config import UserError, load_recipe
from tunesmith.ledger import Store
from tunesmith.ledger.store import RESOLVED
from tunesmith.pipeline import Stages
from tunesmith.report import figures as say
from tunesmith.report.charts import Plot
from tunesmith.report.render import render_page

_COLUMNS = [
    "Load", "Tokens/s", "Requests/s", "TTFT ms, p50 / p95", "TPOT ms, p50 / p95",
    "ITL ms, p50 / p95", "Kept promise", "USD per M in", "USD per M out", "Run",
]  # fmt: skip
_LEADS = {
    "batch": "A full queue: what the engine delivers at most, and what a token costs then.",
    "serve": "Requests that arrive on their own, timed from when they were meant to be sent.",
    "sweep": "Many loads, and the highest rate that keeps the promise.",
    "settings": "Values of the engine section in turns, and what each changes.",
    "frontier": "Quality, speed, memory and price of every model, measured in turns.",
}


def write_page(store: Store, reference: str, path: Path) -> Path:
    """Write the page of a benchmark and return its path. Raises UserError when it is none."""
    artifact = store.get(reference)
    source = artifact.root / "bench.json"
    found = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    if found.get("schema_version") != 2 or found.get("mode") not in _LEADS:
        raise UserError(
            f"{artifact.id} is no bench batch, serve, sweep, settings or frontier of today"
        )
    if found["mode"] == "frontier":
        recipe = load_recipe(artifact.root / RESOLVED)
        found |= result_of(Stages(recipe, store), artifact)
    name, price = artifact.manifest.name, artifact.manifest.section["price"]
    return render(found, path, name, artifact.id, price["gpu_hour_usd"] if price else None)


def render(
    found: Mapping[str, Any], path: Path, name: str, artifact_id: str, hour_usd: float | None
) -> Path:
    """The page of what `bench.json` has."""
    tables, plots, tiles = _PARTS[found["mode"]](found)
    machine = found["environment"]
    facts = {
        "title": f"{name} · bench {found['mode']}",
        "lead": _LEADS[found["mode"]],
        "id": artifact_id,
        "hardware": ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cpu_count']} cores",
        "hour_usd": hour_usd,
        "tiles": tiles,
        "tables": tables,
        "load": {key: value for key, value in found["bench"].items() if value not in (None, [])},
        "machine": {key: machine[key] for key in machine if key not in ("versions", "gpus")},
        "versions": machine["versions"],
    }
    return render_page("bench.html.jinja", path, facts, {"plots": [one for one in plots if one]})


Parts = tuple[list[dict[str, Any]], list[Plot | None], list[dict[str, str]]]


def _loads(found: Mapping[str, Any]) -> Parts:
    """Of bench batch and bench serve: a line for each model."""
    measured = {name: one for name, one in found["variants"].items() if "samples" in one}
    refused = [
        f"{name} cannot run here: {one['figures']['refused']}"
        for name, one in found["variants"].items()
        if name not in measured
    ]
    rows = [_row(name, one["figures"]) for name, one in measured.items()]
    doubts = _doubts({name: one["figures"] for name, one in measured.items()})
    notes = [*_about(measured), *refused]
    slo = found["bench"]["slo"]
    serve = found["mode"] == "serve"
    plots = [
        distribution(
            measured, "Time to the first token", "From the intended start.", _ttft_ms,
            slo["ttft_p95_ms"] if serve else None,
        ),
        distribution(
            measured, "Time per output token", "The mean of each answer after its first.", _tpot_ms,
            slo["tpot_p95_ms"] if serve else None,
        ),
        distribution(measured, "Whole answers", "From the intended start.", _e2e_ms),
        timeline(measured),
    ]  # fmt: skip
    columns = ["Model", *_COLUMNS[1:]]
    table = {
        "title": "Models", "columns": columns, "rows": rows, "doubts": doubts, "notes": notes
    }  # fmt: skip
    return [table], plots, _tiles({name: one["figures"] for name, one in measured.items()})


def _sweep(found: Mapping[str, Any]) -> Parts:
    """Of bench sweep: a table for each model, a line for each load."""
    limit_ms = found["bench"]["slo"]["ttft_p95_ms"]
    tables, plots, tiles = [], [], []
    for name, one in found["variants"].items():
        if "refused" in one:
            tables.append(
                {"title": name, "columns": ["Load"], "rows": [], "doubts": [one["refused"]],
                 "notes": []}
            )  # fmt: skip
            continue
        named = {"saturation": one["saturation"]}
        named |= {f"{point['concurrency']} in flight": point for point in one["concurrencies"]}
        named |= {f"{point['request_rate']:.4g}/s": point for point in one["rates"]}
        figures = {load: point["figures"] for load, point in named.items()}
        notes = ["An overloaded engine is INVALID only where its answers are doubtful."]
        tables.append(
            {"title": name, "columns": _COLUMNS, "notes": notes, "doubts": _doubts(figures),
             "rows": [_row(load, point) for load, point in figures.items()]}
        )  # fmt: skip
        plots += [
            by_rate(name, one["rates"], limit_ms),
            by_concurrency(name, [*one["concurrencies"], one["saturation"]]),
        ]
        if best := one["best"]:
            tiles.append(
                {
                    "figure": f"{best['request_rate']:.3g}/s",
                    "label": f"highest rate that keeps the promise, {name}",
                    "detail": f"{best['figures']['goodput']['share']:.1%} of "
                    f"{best['figures']['requests']} requests kept it",
                }
            )
    return tables, plots, tiles


def _frontier(found: Mapping[str, Any]) -> Parts:
    """Of bench frontier: one table of all cells."""
    rows = [frontier_row(cell) for cell in found["cells"]]
    table = {
        "title": "Models", "columns": frontier_columns(), "rows": rows,
        "doubts": frontier_remarks(found["cells"]), "notes": [found["verdict"]],
    }  # fmt: skip
    measured = {name: one for name, one in found["variants"].items() if "samples" in one}
    plots = [
        pareto(found["cells"]),
        distribution(measured, "Time to the first token", "From the intended start.", _ttft_ms,
                     found["bench"]["slo"]["ttft_p95_ms"]),
    ]  # fmt: skip
    return [table], plots, []


def _settings(found: Mapping[str, Any]) -> Parts:
    """Of bench settings: one table of all values."""
    table = {
        "title": found["model"], "columns": settings_columns(),
        "rows": settings_rows(found["steps"]), "doubts": remarks(found["steps"]),
        "notes": [advice(found)],
    }  # fmt: skip
    return [table], [], []


_PARTS = {
    "batch": _loads, "serve": _loads, "sweep": _sweep, "frontier": _frontier, "settings": _settings
}  # fmt: skip


def _row(name: str, figures: Mapping[str, Any]) -> list[str]:
    rate = figures["output_tokens_per_s"]
    return [
        name,
        f"{rate['value']:,.0f}" if rate else NOTHING,
        f"{figures['requests_per_s']:.2f}" if rate else NOTHING,
        pair(figures["ttft_ms"]),
        pair(figures["tpot_ms"]),
        pair(figures["itl_ms"]),
        f"{figures['goodput']['share']:.1%}",
        say.price(figures["usd_per_million_input_tokens"]),
        say.price(figures["usd_per_million_output_tokens"]),
        "VALID" if figures["valid"] else "INVALID",
    ]


def _doubts(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [doubt for name, one in figures.items() for doubt in invalid(name, one["faults"])]


def _about(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What stands beside the table: where the ceiling is, and how the client did."""
    notes = ["Percentiles are of all rounds; USD by the rule of docs/bench.md."]
    for name, one in measured.items():
        figures = one["figures"]
        parts = [
            f"{name}: client {figures['client_lag_p99_ms']:.1f} ms late (p99), "
            f"{figures['client_cpu']:.0%} of a core",
            f"{figures['cache_hit_rate']:.1%} of prompt tokens from the prefix cache",
        ]
        if figures["spread"] is not None:
            parts.append(f"rounds {figures['spread']:.1%} apart")
        if roof := figures["roofline"]:
            parts.append(
                f"a full queue takes {roof['memory']:.0%} of the memory bandwidth and "
                f"{roof['compute']:.0%} of the matrix products that this device was measured to do"
            )
        if figures["joules_per_output_token"]:
            parts.append(f"{figures['joules_per_output_token']:.2f} J per output token")
        notes.append("; ".join(parts) + ".")
    return notes


def _tiles(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The fastest and the cheapest valid model."""
    good = {
        name: one for name, one in figures.items() if one["valid"] and one["output_tokens_per_s"]
    }
    if not good:
        return []
    name = max(good, key=lambda key: float(good[key]["output_tokens_per_s"]["value"]))
    rate = good[name]["output_tokens_per_s"]
    tiles = [
        {
            "figure": f"{rate['value']:,.0f} tok/s",
            "label": f"most output, {name}",
            "detail": f"{rate['low']:,.0f} – {rate['high']:,.0f}",
        }
    ]
    priced = {
        key: one for key, one in good.items() if one["usd_per_million_output_tokens"] is not None
    }
    if priced:
        name = min(priced, key=lambda key: float(priced[key]["usd_per_million_output_tokens"]))
        one = priced[name]
        tiles.append(
            {
                "figure": say.usd(one["usd_per_million_output_tokens"]),
                "label": f"cheapest million output tokens, {name}",
                "detail": f"{say.usd(one['usd_per_million_input_tokens'])} per million input",
            }
        )
    return tiles


def _ttft_ms(sample: Mapping[str, Any]) -> float | None:
    return float(1000 * (sample["piece_s"][0] - sample["intended_s"]))


def _e2e_ms(sample: Mapping[str, Any]) -> float | None:
    return float(1000 * (sample["ended_s"] - sample["intended_s"]))


def _tpot_ms(sample: Mapping[str, Any]) -> float | None:
    later = sample["output_tokens"] - sample["piece_tokens"][0]
    span_s: float = sample["piece_s"][-1] - sample["piece_s"][0]
    return 1000 * span_s / later if later else None
