"""The table of variants: one row of text per model, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.pipeline import Stages
from tunesmith.report import figures as say
from tunesmith.report.contents import Variant, gather


@dataclass(frozen=True)
class Row:
    """A model's figures as text; `–` where there is none."""

    name: str
    size: str
    loss: str
    loss_bounds: str
    change: str
    change_bounds: str
    against: str
    """The model that `change` is against; empty where there is none."""
    shown: bool
    """Whether the change's interval leaves out zero."""
    chrf: str
    chrf_bounds: str
    batch_rate: str
    ttft: str
    tpot: str
    goodput: str
    usd_in: str
    usd_out: str
    runs: str
    """VALID, INVALID, or `–` when nothing was measured."""
    doubts: tuple[str, ...]
    """Why a run is INVALID, or was refused."""


def row(variant: Variant) -> Row:
    """Latency and goodput come from the real-time load, throughput and prices from the full
    queue."""
    batch, serve = variant.bench.get("batch"), variant.bench.get("serve")
    change = variant.change
    digits = say.change_digits(change.relative) if change else 1
    goodput = serve.get("goodput") if serve else None
    return Row(
        name=variant.name,
        size=say.size(variant.size_bytes),
        loss=f"{variant.loss.value:.3f}" if variant.loss else say.NOTHING,
        loss_bounds=say.bounds(variant.loss, 3) if variant.loss else "",
        change=say.percent(change.relative.value, digits) if change else say.NOTHING,
        change_bounds=say.percent_bounds(change.relative, digits) if change else "",
        against=change.against if change else "",
        shown=change.excludes_zero if change else False,
        chrf=f"{variant.chrf.value:.1f}" if variant.chrf else say.NOTHING,
        chrf_bounds=say.bounds(variant.chrf, 1) if variant.chrf else "",
        batch_rate=say.rate(batch),
        ttft=say.two_percentiles(serve, "ttft_ms"),
        tpot=say.two_percentiles(serve, "tpot_ms"),
        goodput=f"{goodput['requests_per_s']:.2f}" if goodput else say.NOTHING,
        usd_in=say.price((batch or {}).get("usd_per_million_input_tokens")),
        usd_out=say.price((batch or {}).get("usd_per_million_output_tokens")),
        runs=_runs(variant),
        doubts=_doubts(variant),
    )


def summary(stages: Stages) -> dict[str, Any]:
    """`{"columns": […], "rows": [[…]]}`: the table that ends a run."""
    rows = [row(variant) for variant in gather(stages).variants]
    return {
        "columns": [
            "model", "size", "loss", "change", "against", "chrF", "batch tok/s",
            "TTFT p50 / p95 ms", "TPOT p50 / p95 ms", "goodput req/s",
            "USD per M in", "out", "runs",
        ],
        "rows": [
            [
                r.name, r.size, r.loss, r.change, r.against or say.NOTHING, r.chrf, r.batch_rate,
                r.ttft, r.tpot, r.goodput, r.usd_in, r.usd_out, r.runs,
            ]
            for r in rows
        ],
    }  # fmt: skip


def _runs(variant: Variant) -> str:
    valid = [figures["valid"] for figures in variant.bench.values() if "valid" in figures]
    if not valid:
        return say.NOTHING
    return "VALID" if all(valid) else "INVALID"


def _doubts(variant: Variant) -> tuple[str, ...]:
    return tuple(
        f"{variant.name}, {mode}: {text}"
        for mode, figures in variant.bench.items()
        for text in (
            [figures["refused"]]
            if "refused" in figures
            else [fault["detail"] for fault in figures["faults"]]
        )
    )
