"""Whether this machine's engine can run a checkpoint, and an adapter on top of it."""

from __future__ import annotations

import importlib.util
import json
import re
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
    capability, config = gpu_capability() if gpu else None, _read(model / "config.json")
    for scheme in schemes_in(config.get("quantization_config") or {}):
        if reason := refusal(scheme.devices(), capability, has_amx=has_amx()):
            return f"{scheme.name}: {reason}"
        on_amx = scheme.name == "w8a8-int8" and not gpu and has_amx()
        if on_amx and (reason := _refused_by_amx(dtype, config.get("architectures") or [])):
            return f"{scheme.name}: on a CPU with AMX, vLLM's kernel takes {reason}"
    return None


def _refused_by_amx(dtype: str, architectures: list[str]) -> str | None:
    """What the INT8 kernel for such CPUs stops on, at the first pass (vLLM 0.32)."""
    if dtype == "float32":
        return "activations in 16 bits alone: set model.dtype: bfloat16"
    if through := [one for one in architectures if _runs_through_transformers(one)]:
        return (
            "two-dimensional activations alone, and transformers' own code, by which vLLM runs "
            f"{through[0]}, gives it others: use w4a16, or a CPU without AMX"
        )
    return None


def _runs_through_transformers(architecture: str) -> bool:
    """Whether vLLM has no model of its own for it; read from its list, which takes seconds to
    import."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return False
    models = Path(found.submodule_search_locations[0], "model_executor", "models", "registry.py")
    entry = re.search(rf'"{re.escape(architecture)}": \(\s*"(\w+)"', models.read_text("utf-8"))
    return entry is None or entry[1] == "transformers"


def check_takes_adapters(model: Path, *, gpu: bool) -> None:
    """Raises ModelError for a checkpoint that runs on this machine, but under no adapter (vLLM
    0.32): its oneDNN kernel gives up the layers' own weights, where LoRA looks for the device."""
    schemes = schemes_in(_read(model / "config.json").get("quantization_config") or {})
    if not gpu and not has_amx() and any(scheme.name == "w8a8-int8" for scheme in schemes):
        raise ModelError(
            f"{model}: w8a8-int8: on a CPU without AMX, vLLM takes no adapter over INT8 layers: "
            "serve the merged model, or adapters over w4a16"
        )


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
