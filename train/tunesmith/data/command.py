"""Make the dataset of a recipe, or find it, and say what is in it."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.data.dataset import make_dataset
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import make_table

_LABELS = {
    "train_rows": "training rows",
    "evaluation_rows": "held-out rows",
    "unused_rows": "left out by max_rows",
    "turns_cut": "turns cut after the last answer",
    "duplicate_rows": "repeated training rows",
    "leaked_rows": "training rows that are held out as well",
    "leaked_prompts": "training rows whose prompt is held out as well",
    "train_characters": "training characters",
    "evaluation_characters": "held-out characters",
}
_SOURCE_LABELS = {
    "weight": "weight",
    "usable_rows": "usable",
    "dropped_rows": "dropped",
    "train_rows": "trained on",
    "evaluation_rows": "held out",
}


def run(stages: Stages) -> dict[str, Any]:
    """Make the dataset unless it is there; its id, folder and counts."""
    artifact = make_dataset(stages)
    return {"id": artifact.id, "path": str(artifact.folder), **artifact.manifest.metrics}


def show(result: dict[str, Any]) -> RenderableType:
    """The counts as a table."""
    rows = [(label, f"{result[key]:,}") for key, label in _LABELS.items()]
    rows += [(f"dropped: {kind}", f"{count:,}") for kind, count in result["dropped"].items()]
    tables = [make_table(result["id"], ("", "count"), rows)]
    if len(result["sources"]) > 1:
        sources = [
            (source["source"], *(f"{source[name]:,.12g}" for name in _SOURCE_LABELS))
            for source in result["sources"]
        ]
        tables.append(make_table("sources", ("", *_SOURCE_LABELS.values()), sources))
    return Group(*tables, Text(result["path"], style="dim"))
