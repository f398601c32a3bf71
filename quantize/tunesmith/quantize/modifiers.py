"""What llm-compressor is asked to do for a scheme."""

from __future__ import annotations

from typing import Any

from tunesmith.quantize.modules import Selection
from tunesmith.quantize.schemes import Scheme


def modifiers(model: Any, scheme: Scheme, selection: Selection, *, calibrated: bool) -> list[Any]:
    """The modifiers of llm-compressor, in the order in which it applies them."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = GPTQModifier if calibrated else QuantizationModifier
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    return [
        modifier(
            config_groups={"weights": _group(scheme, selection.group_size)},
            ignore=[name for name in linear if name in selection.kept],
        )
    ]


def _group(scheme: Scheme, group_size: int | None) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(scheme.preset, ["Linear"])
    if group_size:
        group.weights.group_size = group_size
    return group
