"""A base in compressed-tensors format, as an adapter has to see it that will be served over it.

Weights are made dense once, so that training computes with exactly those that serving stores, at
the speed of any other base. Activations that serving rounds are rounded here as its kernels do,
and gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config.errors import ModelError, UserError, require
from tunesmith.config.schema.train import Train

_FORMAT = "compressed-tensors"
_INT8_LARGEST = 127.0


def is_compressed(folder: Path) -> bool:
    """Whether the model in a folder is stored in this format."""
    return _settings(folder).get("quant_method") == _FORMAT


def check_base(folder: Path, train: Train) -> None:
    """Raise UserError where a base is quantized and `train` needs weights in full precision."""
    if not is_compressed(folder):
        return
    where = f"{folder} is quantized"
    if train.method != "lora":
        raise UserError(f"train.method: {where}; over such a base there is lora alone")
    if train.merge:
        raise UserError(
            f"train.merge: {where}, and an adapter that is merged into it would be quantized with "
            "it; it is served over the base as it is: set train.merge: false"
        )
    starts = ("zeros", "loftq") if train.over else ("zeros",)
    if train.lora.use_dora or train.lora.init_lora_weights not in starts:
        raise UserError(
            f"train.lora: {where}; DoRA does not go, nor another start than {' or '.join(starts)}"
        )
    if train.base_precision != "same":
        raise UserError(f"train.base_precision: {where} already; leave it out")


def loading_options(folder: Path) -> dict[str, Any]:
    """What `from_pretrained` needs to leave such weights as they are stored."""
    require("compressed_tensors", "quantize")
    from transformers.utils.quantization_config import CompressedTensorsConfig

    if _settings(folder).get("kv_cache_scheme"):
        raise ModelError(
            f"{folder}: its key-value cache is quantized, which training does not compute with; "
            "train over a checkpoint without that"
        )
    return {"quantization_config": CompressedTensorsConfig(dequantize=False)}


@torch.no_grad()
def make_dense(model: Any, dtype: torch.dtype) -> None:
    """Put plain linear layers in the place of compressed ones, one after the other.

    Raises ModelError for activations that are rounded in another way than token by token.
    """
    from compressed_tensors.compressors.base import decompress_module

    found = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    ]
    for name, module in found:
        rounding = _rounding(name, module.quantization_scheme)
        decompress_module(module)
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
        layer.weight = nn.Parameter(module.weight.to(dtype))
        if module.bias is not None:
            layer.bias = module.bias
        if rounding:
            layer.register_forward_pre_hook(rounding)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    # Before its first pass the model would look for layers to make dense, and move all others.
    if hook := model.__dict__.pop("ct_decompress_hook", None):
        hook.remove()
    model.is_quantized = False
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)


class _RoundToInt8(torch.autograd.Function):
    """Each token in 8-bit integers with a scale of its own, as vLLM's kernels have it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        exact = value.float()
        scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-10) / _INT8_LARGEST
        return ((exact / scale).round() * scale).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _rounding(name: str, scheme: Any) -> Any:
    """A hook that rounds a layer's inputs as serving does; None where it does not."""
    given = scheme.input_activations
    if given is None:
        return None
    by_token = given.strategy == "token" and given.dynamic is True and given.symmetric
    if not by_token or given.num_bits != 8 or given.type != "int":
        raise ModelError(
            f"{name}: its activations are rounded to {given.num_bits}-bit {given.type} by "
            f"{given.strategy}, which training does not compute with; train over w8a8-int8 or a "
            "scheme that rounds weights alone"
        )
    return lambda _layer, inputs: (_RoundToInt8.apply(inputs[0]), *inputs[1:])


def _settings(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = config.get("quantization_config") or {}
    return found
