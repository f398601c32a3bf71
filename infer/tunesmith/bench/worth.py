"""Economics of measured figures, with what the model cost to make, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tunesmith.bench.economics import Capacity, economics
from tunesmith.bench.rig import bench_of, hour_usd
from tunesmith.pipeline import Stages


def worth(stages: Stages, variant: str, figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a valid run with a price; None of others."""
    hourly_usd = hour_usd(stages)
    if hourly_usd is None or not figures.get("valid") or not figures["requests_per_s"]:
        return None
    capacity = Capacity(
        requests_per_s=figures["requests_per_s"],
        accepted_share=figures["goodput"]["share"],
        input_tokens=figures["mean_input_tokens"],
        output_tokens=figures["output_tokens"],
    )
    return asdict(economics(bench_of(stages), hourly_usd, capacity, made_usd(stages, variant)))


def made_usd(stages: Stages, variant: str) -> float | None:
    """What was paid to make a variant and all it was made from; None where no price was known."""
    artifact = stages.store.find(stages.variants[variant].id)
    if artifact is None:
        return None
    lineage = {one.id: one for one in (artifact, *stages.store.ancestors(artifact))}
    costs = [one.manifest.cost.usd for one in lineage.values()]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known else None


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """What a person wants to know first."""
    parts = [f"{name}: {_usd(found['usd_per_request'])} a request"]
    if found["usd_per_accepted_request"]:
        parts.append(f"{_usd(found['usd_per_accepted_request'])} one within the promise")
    if found["made_usd_per_request"]:
        parts.append(f"{_usd(found['made_usd_per_request'])} more for its making")
    text = ", ".join(parts)
    if found["api_usd_per_request"] is None:
        return f"{text}."
    text += f"; the API asks {_usd(found['api_usd_per_request'])}"
    if found["break_even_requests_per_hour"] is None:
        return f"{text}, and is cheaper at any traffic that one engine can answer."
    text += f": one engine is cheaper above {found['break_even_requests_per_hour']:,.0f} an hour"
    if found["engines"]:
        text += (
            f"; the expected traffic takes {found['engines']} for {_usd(found['hour_usd'])} an "
            f"hour, {_usd(found['api_hour_usd'])} at the API"
        )
    if found["payback_requests"]:
        text += f"; its making is paid back after {found['payback_requests']:,.0f} requests"
    return f"{text}."


def _usd(value: float) -> str:
    return f"USD {value:.3g}"
