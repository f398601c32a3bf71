"""What llm-compressor is asked to do for a scheme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.quantize.modules import Selection
from tunesmith.quantize.schemes import Method


def modifiers(model: Any, method: Method, selection: Selection) -> list[Any]:
    """The modifiers of llm-compressor, in the order in which it applies them."""
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    settings = {
        "config_groups": {"weights": _group(method, selection.group_size)},
        "ignore": [name for name in linear if name in selection.kept],
        "kv_cache_scheme": _kv_cache_scheme() if method.kv_cache else None,
    }
    return [*_transforms(method), _quantizer(method, settings)]


def _transforms(method: Method) -> list[Any]:
    """What changes the weights before they are quantized."""
    from llmcompressor.modifiers.transform import AWQModifier, SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    found: list[Any] = []
    if method.rotation:
        found.append(SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"))
    if method.smoothquant:
        found.append(SmoothQuantModifier(smoothing_strength=method.smoothquant))
    if method.algorithm == "awq":
        found.append(AWQModifier())
    return found


def _quantizer(method: Method, settings: dict[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    # AWQ has scaled the weights so that rounding each to the nearest is good enough.
    return (GPTQModifier if method.algorithm == "gptq" else QuantizationModifier)(**settings)


def _group(method: Method, group_size: int | None) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(method.scheme.preset, ["Linear"])
    if method.scheme.scales == "group":
        group.weights.group_size = group_size
    group.weights.symmetric = method.symmetric
    return group


def _kv_cache_scheme() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)


@contextmanager
def without_pinning() -> Iterator[None]:
    """Let AWQ work where there is no accelerator: it pins what it keeps to copy it to one faster,
    asking nobody whether there is one."""
    import torch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *_args, **_kwargs: None):
        yield
