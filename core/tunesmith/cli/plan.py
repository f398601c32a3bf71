"""`tunesmith plan`: every stage plans its own work; here it is put together."""

from __future__ import annotations

import importlib
from typing import Any

from rich.console import Group, RenderableType

from tunesmith.pipeline import Stages
from tunesmith.pipeline.measured import PRICED_BY, is_price, known
from tunesmith.terminal import make_table

_PRICES = ("usd_per_million_input_tokens", "usd_per_million_output_tokens")


def run(stages: Stages, device: str) -> dict[str, Any]:
    """What the training takes, what quantizing takes, and what serving was measured to cost."""
    result: dict[str, Any] = importlib.import_module("tunesmith.train.plan").run(stages, device)
    if stages.recipe.quantize:
        tflops = result.get("time", {}).get("matmul_tflops")
        quantizing = importlib.import_module("tunesmith.quantize.plan")
        result["quantizing"] = quantizing.run(stages, tflops)
    if stages.recipe.bench:
        result["serving"] = {name: _serving(stages, name) for name in stages.benchmarked}
    return result


def _serving(stages: Stages, name: str) -> dict[str, Any]:
    """What benchmarks on this machine say of a model; nothing is guessed where there is none."""
    priced = [one for one in known(stages, name, *PRICED_BY) if is_price(one.figures)]
    swept = [one for one in known(stages, name, "sweep") if one.figures["best"]]
    found: dict[str, Any] = {"sources": [one.source for one in (*priced[:1], *swept)]}
    if priced:
        found |= {key: priced[0].figures[key] for key in _PRICES}
    if swept:
        found["requests_per_s_within_slo"] = swept[0].figures["best"]["request_rate"]
    return found


def show(result: dict[str, Any]) -> RenderableType:
    """The tables of all."""
    parts = [importlib.import_module("tunesmith.train.plan").show(result)]
    if planned := result.get("quantizing"):
        parts.append(importlib.import_module("tunesmith.quantize.plan").show(planned))
    if serving := result.get("serving"):
        parts.append(_serving_table(serving))
    return Group(*parts)


def _serving_table(serving: dict[str, Any]) -> RenderableType:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:,.4g}"

    rows = [
        (
            name,
            *(cell(found.get(key)) for key in (*_PRICES, "requests_per_s_within_slo")),
            ", ".join(found["sources"]) or "no benchmark of this here; run: tunesmith bench all",
        )
        for name, found in serving.items()
    ]
    columns = ("model", "USD per M in", "USD per M out", "most requests/s", "measured by")
    return make_table("Serving, as measured on this machine", columns, rows)
