"""`tunesmith plan`: every stage plans its own work; here it is put together."""

from __future__ import annotations

import importlib
from typing import Any

from rich.console import Group, RenderableType

from tunesmith.pipeline import Stages


def run(stages: Stages, device: str) -> dict[str, Any]:
    """What the training takes, and what quantizing takes."""
    result: dict[str, Any] = importlib.import_module("tunesmith.train.plan").run(stages, device)
    if stages.recipe.quantize:
        tflops = result.get("time", {}).get("matmul_tflops")
        quantizing = importlib.import_module("tunesmith.quantize.plan")
        result["quantizing"] = quantizing.run(stages, tflops)
    return result


def show(result: dict[str, Any]) -> RenderableType:
    """The tables of both."""
    parts = [importlib.import_module("tunesmith.train.plan").show(result)]
    if planned := result.get("quantizing"):
        parts.append(importlib.import_module("tunesmith.quantize.plan").show(planned))
    return Group(*parts)
