"""Start an adapter from what 4-bit quantization took from its base (LoftQ, arXiv:2310.08659).

PEFT has a function for it that needs a GPU, and that leaves out that an adapter's product is
scaled by lora_alpha / r.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.config.errors import ModelError

_MORE_DIRECTIONS = 8
_POWER_ITERATIONS = 4
"""Of the randomized decomposition: its error is then that of the exact one within some percent."""


@torch.no_grad()
def mend_quantization(peft_model: Any, folder: Path) -> None:
    """Set each adapter to the best approximation, of its rank, of the difference between the base's
    own weights, read from `folder`, and their NF4 form.

    Raises ModelError when the folder does not have them as safetensors.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    base = peft_model.get_base_model()
    names = {id(module): name for name, module in base.named_modules()}
    read = _reader(folder, base.base_model_prefix)
    for module in peft_model.modules():
        if not isinstance(module, Linear4bit):
            continue
        weight = module.base_layer.weight
        lost = read(f"{names[id(module)]}.weight").to(weight.device, torch.float32)
        lost -= dequantize_4bit(weight.data, weight.quant_state).float()
        for adapter, rank in module.r.items():
            directions = min(rank + _MORE_DIRECTIONS, *lost.shape)
            left, sizes, right = torch.svd_lowrank(lost, directions, _POWER_ITERATIONS)
            root = sizes[:rank].sqrt()
            module.lora_A[adapter].weight.copy_((right[:, :rank] * root).T)
            module.lora_B[adapter].weight.copy_(left[:, :rank] * root / module.scaling[adapter])


def _reader(folder: Path, prefix: str) -> Callable[[str], Tensor]:
    """Reads a weight by its name in the model, which a file may leave the prefix out of."""
    index = folder / "model.safetensors.index.json"
    files: dict[str, str] = {}
    if index.exists():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")

    def read(name: str) -> Tensor:
        for known in (name, name.removeprefix(f"{prefix}.")):
            if known in files:
                with safe_open(folder / files[known], framework="pt") as file:
                    weight: Tensor = file.get_tensor(known)
                    return weight
        raise ModelError(
            f"train.lora.init_lora_weights: loftq needs {name} as safetensors in {folder}, which "
            "has no such weight; use zeros"
        )

    return read
