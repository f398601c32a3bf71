"""Whether this machine's engine can run a checkpoint, and an adapter on top of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.config.errors import ModelError
from tunesmith.config.schemes import has_amx, refusal, schemes_in
from tunesmith.ledger import gpu_capability


def check_device(model: Path, dtype: str, *, gpu: bool) -> None:
    """Raises ModelError for a quantized model that vLLM would only fail on, or hang, after it has
    been loaded: with the reason, the devices that run it, and the nearest scheme that runs here."""
    if reason := refused_here(model, dtype, gpu=gpu):
        raise ModelError(f"{model}: {reason}")


def refused_here(model: Path, dtype: str, *, gpu: bool) -> str | None:
    """Why vLLM cannot run a model on this machine; None when it can."""
    capability = gpu_capability() if gpu else None
    for scheme in schemes_in(_read(model / "config.json").get("quantization_config") or {}):
        if reason := refusal(scheme.devices(), capability, has_amx=has_amx()):
            return f"{scheme.name}: {reason}"
        if scheme.name == "w8a8-int8" and dtype == "float32" and not gpu and has_amx():
            return (
                f"{scheme.name}: on a CPU with AMX, vLLM's kernel takes activations in 16 bits "
                "alone: set model.dtype: bfloat16"
            )
    return None


def check_adapter(model: Path, adapter: Path) -> None:
    """Raises ModelError for an adapter of the parent over a checkpoint whose layers meet other
    activations than those of the parent: it would answer, and badly."""
    made = _read(model / "manifest.json")
    over = _read(adapter / "manifest.json").get("parents", {}).get("base")
    if made.get("metrics", {}).get("changes_activations") and over != made["id"]:
        raise ModelError(
            f"{adapter} was not trained over {made['id']}, whose {made['label']} has changed what "
            "flows between the layers, so it does not fit (on any device); serve the merged model, "
            "or quantize by gptq or rtn without smoothquant and rotation"
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file, of which vLLM says best what it lacks."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
