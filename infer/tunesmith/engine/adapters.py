"""What vLLM has to know of LoRA adapters when it starts, and whether a later one fits that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.config.errors import ModelError, require
from tunesmith.engine.fit import check_adapter, check_takes_adapters

# The ranks that vLLM has room for (`vllm.config.lora.MaxLoRARanks`).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# More of them in one step cost memory for each; those beyond are swapped in.
_ADAPTERS_AT_ONCE = 4


def adapter_arguments(
    model: Path, adapters: Sequence[Path], slots: int, *, gpu: bool
) -> dict[str, Any]:
    """vLLM's arguments for these adapters, and for as many as `slots` in their places later.

    Raises ModelError for one that does not fit the model.
    """
    check_takes_adapters(model, gpu=gpu)
    for adapter in adapters:
        check_adapter(model, adapter)
    held = max(len(adapters), slots)
    # On a CPU vLLM gives a request without an adapter the one in the last slot when others of
    # the step have one (`lora_ops.bgmv_expand` indexes by -1), so that slot stays empty.
    at_once = min(held, _ADAPTERS_AT_ONCE) if gpu else held + 1
    return {
        "enable_lora": True,
        "max_loras": at_once,
        "max_cpu_loras": max(at_once, held),
        "max_lora_rank": max(map(_lora_rank, adapters)),
        # Without this vLLM also wraps the output head, after which it computes the
        # log-probabilities of prompts wrongly or stops (vllm#29955, vllm#51594).
        "lora_target_modules": sorted({*chain.from_iterable(map(_adapted_modules, adapters))}),
    }


def check_later_adapter(model: Path, adapter: Path, arguments: dict[str, Any]) -> None:
    """Raises ModelError for an adapter that a running engine, started with `arguments`, would
    refuse, or would load in part without a word."""
    check_adapter(model, adapter)
    if "max_lora_rank" not in arguments:
        raise ModelError(f"{adapter}: the engine was started without room for adapters")
    rank, most = _lora_rank(adapter), arguments["max_lora_rank"]
    if rank > most:
        raise ModelError(
            f"{adapter}: its rank needs room for {rank}, and the engine was started with room for "
            f"{most}; start the server again with this adapter in its recipe"
        )
    if others := _adapted_modules(adapter) - {*arguments["lora_target_modules"]}:
        raise ModelError(
            f"{adapter} changes {', '.join(sorted(others))}, and the engine was started for "
            f"{', '.join(arguments['lora_target_modules'])}; start the server again with this "
            "adapter in its recipe"
        )


def _adapted_modules(adapter: Path) -> set[str]:
    """Last parts of the names of the layers that the adapter changes."""
    safetensors = require("safetensors", "infer")
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        layers = {name.partition(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    return {layer.rpartition(".")[2] for layer in layers}


def _lora_rank(adapter: Path) -> int:
    """The adapter's rank, rounded up to one that vLLM has room for."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rank = max(config["r"], *config.get("rank_pattern", {}).values(), 1)
    if rank > _LORA_RANKS[-1]:
        raise ModelError(
            f"{path}: rank {rank} is above {_LORA_RANKS[-1]}, the most that vLLM serves; "
            "serve the merged model, or train with a smaller train.lora.r"
        )
    return next(allowed for allowed in _LORA_RANKS if allowed >= rank)
